"""Read a whole source and tell what is there: counts, broken files, sizes, modes, captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demerge.data.arrays import is_cifar, is_idx
from demerge.data.captions import find_captions
from demerge.data.folder import DEEP, Header, check, decode, find_images, own_test
from demerge.data.load import read_source, split_positions
from demerge.errors import InputError

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Scan:
    """What a source holds.

    Attributes:
        files: images found, readable or not.
        broken: name and reason of each file that cannot be read, in order of name.
        sizes: how many images there are of each `WIDTHxHEIGHT`, the most frequent first.
        modes: how many there are of each mode: `RGB`, `L`, `RGBA`, `I;16` and so on.
        notes: how many were turned by EXIF, had transparency laid on white, or had 16 bits scaled to 8.
        captions: how many images have one; None where there is no metadata file.
        splits: how many readable images `train` and `test` have.
        complaint: what is wrong with the metadata file; empty where nothing is.
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

    @property
    def readable(self) -> int:
        """How many images can be read."""
        return self.files - len(self.broken)

    @property
    def verdict(self) -> str:
        """One sentence: whether the source can be used as it is, and if not what to do."""
        if self.broken:
            return f"{len(self.broken)} of {self.files} files are broken: mend or remove them, or use --skip-broken"
        if self.complaint:
            return f"captions cannot be read: {self.complaint}"
        if self.captions is not None and self.captions < self.readable:
            return f"{self.readable - self.captions} images have no caption: add them for text-to-image models"
        if len(self.sizes) > 1:
            return "usable; images of several sizes are fitted to the model's resolution"
        return "usable"

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
            "splits": self.splits,
            "complaint": self.complaint,
            "verdict": self.verdict,
        }


def scan(source: str | Path, *, progress: Progress | None = None) -> Scan:
    """Read everything in a source; broken files are part of the answer.

    Raises:
        InputError: where there is no such source, or it holds no image at all.
    """
    path = Path(source)
    if str(source) != "digits" and path.is_dir() and not is_cifar(path) and not is_idx(path):
        return _scan_folder(path, progress)
    read = read_source(source)
    n = len(read.pixels)
    sizes = {f"{w}x{h}": n for _, h, w in read.pixels.shapes}
    modes = {"RGB" if c == 3 else "L": n for c, _, _ in read.pixels.shapes}
    captions = None if read.captions is None else len(read.captions)
    return Scan(str(source), n, (), sizes, modes, {}, captions, _splits(n, read.test))


def _scan_folder(folder: Path, progress: Progress | None) -> Scan:
    paths = find_images(folder)
    headers: dict[Path, Header] = {}
    broken: list[tuple[str, str]] = []
    for done, path in enumerate(paths, start=1):
        try:
            header = check(path)
            decode(path)
            headers[path] = header
        except InputError as error:
            broken.append((path.relative_to(folder).as_posix(), error.what.removeprefix(f"{path}: ")))
        if progress is not None:
            progress(done, len(paths), f"{len(broken)} broken" if broken else "")
    captions, complaint = _captions(folder, headers)
    splits = _splits(len(headers), own_test(folder, list(headers)))
    return Scan(str(folder), len(paths), tuple(broken), *_counts(headers), captions, splits, complaint)


def _captions(folder: Path, images: Iterable[Path]) -> tuple[int | None, str]:
    try:
        captions = find_captions(folder)
    except InputError as error:
        return 0, error.what
    return (None if captions is None else sum(path in captions for path in images)), ""


def _splits(n: int, test: Sequence[int] | None) -> dict[str, int]:
    return {split: len(split_positions(n, test, split)) for split in ("train", "test")}


def _counts(headers: dict[Path, Header]) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    found = headers.values()
    notes = {
        "turned by EXIF": sum(h.turned for h in found),
        "transparency laid on white": sum(h.alpha for h in found),
        "16 bits scaled to 8": sum(h.mode in DEEP for h in found),
    }
    sizes = Counter(f"{h.width}x{h.height}" for h in found)
    return (
        dict(sizes.most_common()),
        dict(Counter(h.mode for h in found).most_common()),
        {k: v for k, v in notes.items() if v},
    )
