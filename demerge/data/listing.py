"""What a folder of images holds: its images, its captions' files, and what is passed over, each by name.

Hidden names are left out. A linked folder is followed unless it leads to a folder that is read already, or to one that holds
the data, so that every folder is read once and no link runs in a circle.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from demerge.errors import InputError

READABLE = (
    *(
        "apng",
        "avif",
        "bmp",
        "dib",
        "gif",
        "j2k",
        "jfif",
        "jp2",
        "jpe",
        "jpeg",
        "jpf",
        "jpg",
        "jpx",
        "mpo",
    ),
    *("pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
)
REFUSED = (
    "arw",
    "cr2",
    "cr3",
    "dng",
    "heic",
    "heif",
    "hif",
    "jxl",
    "nef",
    "orf",
    "qoi",
    "raf",
    "rw2",
    "tga",
)  # by name
KINDS = frozenset({*READABLE, *REFUSED})
METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = ("txt", "caption")
FILES = frozenset({*KINDS, *SIDECARS, "jsonl", "csv"})

Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a folder and its subfolders, sorted by relative name.

    Attributes:
        images: files with the suffix of an image, whether they can be read or not.
        metadata: files of captions in the Hub's layout.
        texts: files that are a caption if an image has their name.
        others: how many files of each other suffix there are.
        linked: linked folders that were followed.
        left_out: linked folders that were not followed, since their files are read already.
        closed: folders that cannot be read, and links that may have led to one, with the reason.
    """

    folder: Path
    images: tuple[Path, ...]
    metadata: tuple[Path, ...]
    texts: tuple[Path, ...]
    others: dict[str, int]
    linked: tuple[Path, ...]
    left_out: tuple[Path, ...]
    closed: tuple[tuple[Path, str], ...]

    def name(self, path: Path) -> str:
        """Return the name of a file relative to the folder, as `escaped` text."""
        return escaped(path.relative_to(self.folder).as_posix())


def escaped(name: str) -> str:
    """Return a file's name as text that UTF-8 can hold: a byte that is not UTF-8 becomes its code, as in Python's bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def list_folder(folder: Path) -> Listing:
    """List a folder.

    Raises:
        InputError: if there is no image in it.
    """
    walk = _Walk(folder)
    files = sorted(walk, key=lambda path: path.relative_to(folder).as_posix())
    kinds = [_kind(path) for path in files]
    images = tuple(path for path, kind in zip(files, kinds, strict=True) if kind in KINDS)
    if not images and not walk.closed:
        raise InputError(
            f"{folder}: no image in this folder",
            fix="give a folder of png, jpg, webp, tif or bmp files",
        )
    texts = [path for path, kind in zip(files, kinds, strict=True) if kind in SIDECARS]
    metadata = tuple(path for path in files if path.name in METADATA)
    others = Counter(
        f".{escaped(kind)}" if kind else "no suffix"
        for path, kind in zip(files, kinds, strict=True)
        if kind not in KINDS and kind not in SIDECARS and path.name not in METADATA
    )
    return Listing(
        folder,
        images,
        metadata,
        tuple(texts),
        dict(others),
        tuple(walk.linked),
        tuple(walk.left_out),
        tuple(walk.closed),
    )


def _kind(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


class _Walk:
    """Yield the files below a folder: real folders first, then linked ones, each folder once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[Identity] = {_identity(parent) for parent in folder.resolve().parents}
        self.linked: list[Path] = []
        self.left_out: list[Path] = []
        self.closed: list[tuple[Path, str]] = []

    def __iter__(self) -> Iterator[Path]:
        links: list[Path] = []
        yield from self._real([self.folder], links)
        while links:
            links.sort()
            link = links.pop(0)
            if _identity(link) in self.seen:
                self.left_out.append(link)
                continue
            self.linked.append(link)
            yield from self._real([link], links)

    def _real(self, places: list[Path], links: list[Path]) -> Iterator[Path]:
        while places:
            place = places.pop()
            try:
                self.seen.add(_identity(place))
                entries = [entry for entry in os.scandir(place) if not entry.name.startswith(".")]
            except OSError as error:
                self.closed.append((place, f"the folder cannot be read: {error.strerror}"))
                continue
            for entry in entries:
                if (
                    entry.is_symlink()
                    and not os.path.exists(entry.path)
                    and _kind(Path(entry.path)) not in FILES
                ):
                    self.closed.append((Path(entry.path), "the link leads nowhere"))
                elif not entry.is_dir():
                    yield Path(entry.path)
                else:
                    (links if entry.is_symlink() else places).append(Path(entry.path))


def _identity(folder: Path) -> Identity:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino
