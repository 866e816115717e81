"""Read a whole source and report counts, broken files, sizes, modes, captions and other files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from demerge.data.arrays import is_cifar, is_idx
from demerge.data.captions import Captions, escape_text, find_captions
from demerge.data.folder import read_headers
from demerge.data.layout import Splits, find_splits
from demerge.data.listing import list_folder, suffix_of
from demerge.data.load import read_source, split_positions
from demerge.errors import InputError
from demerge.progress import Progress, silent

SHOWN = 6
MOST_BROKEN = 100
UNUSABLE = "cannot be used as it is"


@dataclass(frozen=True, slots=True)
class Scan:
    """The content of a source.

    Attributes:
        images: the number of images, readable or not.
        broken: name and reason of each file or folder that cannot be read, in order of name.
        sizes: the number of images of each `WIDTHxHEIGHT`, the most frequent first.
        modes: the number of each mode: `RGB`, `L`, `RGBA`, `I;16` and so on.
        notes: the number that were turned by EXIF, had transparency laid on white, and so on.
        captions: the number of images with a caption; None if there are no captions at all.
        captions_without_image: the number of captions that name no image.
        splits: the number of readable images in `train` and `test`, and in neither.
        passed_over: the number of files of other kinds, by suffix.
        links: what happened to linked folders, by name.
        complaint: what is wrong with captions or splits; empty if nothing is.
    """

    source: str
    images: int
    broken: tuple[tuple[str, str], ...]
    sizes: dict[str, int]
    modes: dict[str, int]
    notes: dict[str, int]
    captions: int | None
    captions_without_image: int
    splits: dict[str, int]
    passed_over: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    complaint: str = ""

    @property
    def readable(self) -> int:
        """The number of images that can be read."""
        return sum(self.sizes.values())

    @property
    def usable(self) -> bool:
        """Whether every image was read and a finetune takes the source as it is."""
        return not self.broken and not self.complaint and self.captions in (None, self.readable)

    @property
    def verdict(self) -> str:
        """One sentence: whether the source can be used as it is, and if not what to do."""
        count = f"{self.readable:,} of {self.images:,} images"
        if self.broken:
            kinds = Counter(suffix_of(name) or "no suffix" for name, _ in self.broken).most_common()
            counts = ", ".join(f"{kind} {count:,}" for kind, count in kinds)
            broken = f"{len(self.broken)} of {self.images} files are broken ({counts})"
            fix = "convert, replace or remove them, or use --skip-broken"
            return f"{UNUSABLE}: {count} can be read; {broken}: {fix}"
        if self.complaint:
            return f"{UNUSABLE}: {count} can be read; {self.complaint}"
        if not self.usable:
            missing = self.readable - (self.captions or 0)
            return f"{UNUSABLE}: {missing} of {self.readable} images have no caption"
        parts = [f"usable: {count} were read"]
        if len(self.sizes) > 1:
            parts.append("images of several sizes are fitted to the model's resolution")
        if self.passed_over:
            parts.append(f"{sum(self.passed_over.values()):,} other files are passed over")
        if self.captions_without_image:
            parts.append(f"{self.captions_without_image:,} captions name no image")
        return "; ".join(parts)

    def lines(self) -> list[str]:
        """Return the scan for a person; `document` lists all broken files."""
        captions = "none" if self.captions is None else f"{self.captions} of {self.readable}"
        hidden = len(self.broken) - MOST_BROKEN
        rows = [
            ("images", f"{self.images:,}, {self.readable:,} readable"),
            ("splits", _shown(self.splits)),
            ("sizes", _shown_sizes(self.sizes)),
            ("modes", _shown(self.modes)),
            ("captions", captions),
            ("notes", _shown(self.notes)),
            *(("link", f"{name}: {what}") for name, what in self.links.items()),
            ("others", _shown(self.passed_over)),
            *(("broken", f"{name}: {reason}") for name, reason in self.broken[:MOST_BROKEN]),
            ("broken", f"and {hidden:,} more; --json lists all" if hidden > 0 else ""),
            ("verdict", self.verdict),
        ]
        return [f"{name:9} {text}" for name, text in rows if text]

    def document(self) -> dict[str, Any]:
        """Return the scan as a JSON document."""
        broken = [{"file": name, "reason": reason} for name, reason in self.broken]
        counts = {"source": self.source, "images": self.images, "readable": self.readable}
        document = {**counts, **asdict(self), "broken": broken}
        return document | {"usable": self.usable, "verdict": self.verdict}


def _shown(counts: dict[str, int]) -> str:
    shown = [f"{name} ({count:,})" for name, count in list(counts.items())[:SHOWN]]
    if len(counts) > SHOWN:
        shown.append(f"{len(counts) - SHOWN} more")
    return ", ".join(shown)


def _shown_sizes(counts: dict[str, int]) -> str:
    if len(counts) <= SHOWN:
        return _shown(counts)
    sides = [sorted(map(int, size.split("x"))) for size in counts]
    shorter, longer = zip(*sides, strict=True)
    short = f"shorter side {min(shorter)} to {max(shorter)}"
    return f"{len(counts):,} sizes, {short}, longer side {min(longer)} to {max(longer)}"


def scan(source: str | Path, *, progress: Progress = silent) -> Scan:
    """Read everything in a source; broken files are part of the answer.

    Raises:
        InputError: if the source does not exist, or holds no image at all.
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
        progress(i + 1, n, f"{len(broken)} broken" if broken else "")
    sizes, modes = Counter[str](), Counter[str]()
    for (c, h, w), count in shapes.most_common():
        sizes[f"{w}x{h}"] += count
        modes["RGB" if c == 3 else "L"] += count
    captions = None if read.captions is None else len(read.captions)
    name, splits = escape_text(str(source)), _count_splits(n, read.splits)
    return Scan(name, n, tuple(broken), dict(sizes), dict(modes), {}, captions, 0, splits)


def _scan_folder(folder: Path, progress: Progress) -> Scan:
    listing = list_folder(folder)
    headers, errors = read_headers(listing, whole=True, progress=progress)
    broken = [(listing.name(path), reason) for path, reason in listing.closed]
    for path, error in errors.items():
        broken.append((listing.name(path), escape_text(error.what.removeprefix(f"{path}: "))))
    complaint, splits, captions = "", {}, None
    try:
        splits = _count_splits(len(headers), find_splits(folder, list(headers)))
    except InputError as error:
        complaint = error.what
    try:
        captions = find_captions(listing)
    except InputError as error:
        captions, complaint = Captions({}, 0), f"captions cannot be read: {error.what}"
    links = {listing.name(path): "followed" for path in listing.linked}
    for path in listing.left_out:
        links[listing.name(path)] = "left out, its folder is read already"
    return Scan(
        escape_text(str(folder)),
        len(listing.images),
        tuple(broken),
        _frequencies(f"{h.width}x{h.height}" for h in headers.values()),
        _frequencies(h.mode for h in headers.values()),
        _frequencies(note for h in headers.values() for note in h.notes),
        None if captions is None else len(captions.texts.keys() & headers.keys()),
        0 if captions is None else captions.unmatched,
        splits,
        listing.others,
        links,
        escape_text(complaint),
    )


def _count_splits(n: int, splits: Splits) -> dict[str, int]:
    counts = {name: len(split_positions(n, splits, name)) for name in ("train", "test")}
    return counts | ({"in neither": len(splits.spare)} if splits.spare else {})


def _frequencies(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())
