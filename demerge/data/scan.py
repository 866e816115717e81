"""Read a whole source and tell what is there: counts, broken files, sizes, modes, captions, what is passed over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demerge.data.arrays import is_cifar, is_idx
from demerge.data.captions import escaped_text, find_captions
from demerge.data.decode import Header, check, decode
from demerge.data.folder import kinds_of
from demerge.data.layout import Layout, layout
from demerge.data.listing import Listing, list_folder
from demerge.data.load import read_source, split_positions
from demerge.errors import InputError

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Scan:
    """What a source holds.

    Attributes:
        files: images found, readable or not.
        broken: name and reason of each file or folder that cannot be read, in order of name.
        sizes: how many images there are of each `WIDTHxHEIGHT`, the most frequent first.
        modes: how many there are of each mode: `RGB`, `L`, `RGBA`, `I;16` and so on.
        notes: how many were turned by EXIF, had transparency laid on white, and so on.
        captions: how many images have one; None if there are none at all.
        splits: how many readable images `train` and `test` have, and how many are in neither.
        complaint: what is wrong with captions or splits; empty if nothing is.
        passed_over: how many files of other kinds there are, by suffix.
        links: what happened to linked folders, by name.
        unmatched: how many captions name no image.
    """

    source: str
    files: int
    broken: tuple[tuple[str, str], ...]
    sizes: dict[str, int]
    modes: dict[str, int]
    notes: dict[str, int]
    captions: int | None
    splits: dict[str, int]
    complaint: str = ""
    passed_over: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    unmatched: int = 0

    @property
    def readable(self) -> int:
        """How many images can be read."""
        return sum(self.sizes.values())

    @property
    def usable(self) -> bool:
        """Whether every image was read and a finetune takes the source as it is."""
        return not self.broken and not self.complaint and self.captions in (None, self.readable)

    @property
    def verdict(self) -> str:
        """One sentence with counts: whether the source can be used as it is, and if not what to do."""
        count = f"{self.readable:,} of {self.files:,} images"
        if self.broken:
            kinds = kinds_of([name for name, _ in self.broken])
            return (
                f"cannot be used as it is: {count} can be read; {len(self.broken)} of {self.files} files are broken ({kinds}): "
                "convert, replace or remove them, or use --skip-broken"
            )
        if self.complaint:
            return f"cannot be used as it is: {count} can be read; {self.complaint}"
        if not self.usable:
            return f"cannot be used as it is: {self.readable - (self.captions or 0)} of {self.readable} images have no caption"
        extra = [
            "images of several sizes are fitted to the model's resolution"
            if len(self.sizes) > 1
            else "",
            f"{sum(self.passed_over.values()):,} other files are passed over"
            if self.passed_over
            else "",
            f"{self.unmatched:,} captions name no image" if self.unmatched else "",
        ]
        return "; ".join([f"usable: {count} were read", *filter(None, extra)])

    def document(self) -> dict[str, Any]:
        """Return the scan as a JSON document."""
        return {
            "source": self.source,
            "images": self.files,
            "readable": self.readable,
            "broken": [{"file": name, "reason": reason} for name, reason in self.broken],
            "sizes": self.sizes,
            "modes": self.modes,
            "notes": self.notes,
            "captions": self.captions,
            "captions_without_image": self.unmatched,
            "splits": self.splits,
            "passed_over": self.passed_over,
            "links": self.links,
            "complaint": self.complaint,
            "usable": self.usable,
            "verdict": self.verdict,
        }


def scan(source: str | Path, *, progress: Progress | None = None) -> Scan:
    """Read everything in a source; broken files are part of the answer.

    Raises:
        InputError: if there is no such source, or it holds no image at all.
    """
    path = Path(source)
    if str(source) != "digits" and path.is_dir() and not is_cifar(path) and not is_idx(path):
        return _scan_folder(path, progress)
    read = read_source(source)
    n, broken = len(read.pixels), []
    shapes = Counter(dict.fromkeys(read.pixels.shapes, n)) if read.pixels.resident else Counter()
    for i in range(0 if read.pixels.resident else n):
        try:
            shapes[read.pixels.read(i).shape] += 1
        except InputError as error:
            broken.append((f"image {i}", error.what))
        if progress is not None:
            progress(i + 1, n, f"{len(broken)} broken" if broken else "")
    sizes = Counter[str]()
    modes = Counter[str]()
    for (c, h, w), count in shapes.most_common():
        sizes[f"{w}x{h}"] += count
        modes["RGB" if c == 3 else "L"] += count
    captions = None if read.captions is None else len(read.captions)
    name = escaped_text(str(source))
    splits = _splits(n, Layout(test=read.test))
    return Scan(name, n, tuple(broken), dict(sizes), dict(modes), {}, captions, splits)


def _scan_folder(folder: Path, progress: Progress | None) -> Scan:
    listing = list_folder(folder)
    paths = listing.images
    headers: dict[Path, Header] = {}
    broken = [(listing.name(path), reason) for path, reason in listing.closed]
    for done, path in enumerate(paths, start=1):
        try:
            header = check(path)
            decode(path, (1, 1))
            headers[path] = header
        except InputError as error:
            broken.append((listing.name(path), escaped_text(error.what.removeprefix(f"{path}: "))))
        if progress is not None:
            progress(done, len(paths), f"{len(broken)} broken" if broken else "")
    captions, unmatched, complaint = _captions(listing, headers)
    try:
        splits = _splits(len(headers), layout(folder, list(headers)))
    except InputError as error:
        splits, complaint = {}, complaint or error.what
    links = {listing.name(path): "followed" for path in listing.linked}
    links |= {
        listing.name(path): "left out, its folder is read already" for path in listing.left_out
    }
    return Scan(
        escaped_text(str(folder)),
        len(paths),
        tuple(broken),
        *_counts(headers.values()),
        captions,
        splits,
        escaped_text(complaint),
        listing.others,
        links,
        unmatched,
    )


def _captions(listing: Listing, images: Iterable[Path]) -> tuple[int | None, int, str]:
    try:
        captions = find_captions(listing)
    except InputError as error:
        return 0, 0, f"captions cannot be read: {error.what}"
    if captions is None:
        return None, 0, ""
    return (
        sum(captions.get(path) is not None for path in images),
        captions.unmatched(listing.images),
        "",
    )


def _splits(n: int, parts: Layout) -> dict[str, int]:
    counts = {
        split: len(split_positions(n, parts.test, split, parts.spare))
        for split in ("train", "test")
    }
    return counts | ({"in neither": len(parts.spare)} if parts.spare else {})


def _counts(found: Iterable[Header]) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    headers = list(found)
    sizes = Counter(f"{h.width}x{h.height}" for h in headers)
    modes = Counter(h.mode for h in headers)
    notes = Counter(note for h in headers for note in h.notes)
    return dict(sizes.most_common()), dict(modes.most_common()), dict(notes.most_common())
