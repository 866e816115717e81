"""The files of a folder of images: images, caption files, and the other files by kind.

Hidden names are left out. A linked folder is followed unless its folder is read already or holds
the data. So every folder is read once, and no link runs in a circle.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from demerge.errors import InputError

READABLE = (
    "apng avif bmp dib gif j2k jfif jp2 jpe jpeg jpf jpg jpx mpo pbm pgm png pnm ppm tif tiff webp"
)
REFUSED = "arw cr2 cr3 dng heic heif hif jxl nef orf qoi raf rw2 tga"  # reported by name
IMAGES = frozenset(f"{READABLE} {REFUSED}".split())
METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = ("txt", "caption")
FILES = frozenset({*IMAGES, *SIDECARS, "jsonl", "csv"})

Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a folder and its subfolders, sorted by relative name.

    Attributes:
        images: files with the suffix of an image, readable or not.
        metadata: files of captions in the Hub's layout.
        texts: files that are a caption if an image has the same name.
        others: the number of files of each other suffix.
        linked: linked folders that were followed.
        left_out: linked folders that were not followed, since their files are read already.
        closed: folders that cannot be read, and dead links that may lead to one, with the reason.
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
        """Return the name of a file relative to the folder, as `escape_name` writes it."""
        return escape_name(path.relative_to(self.folder).as_posix())


def escape_name(name: str) -> str:
    """Return a file name as text that UTF-8 can hold; a byte that is not UTF-8 becomes its code."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def list_folder(folder: Path) -> Listing:
    """List a folder."""
    walk = _Walk(folder)
    images, metadata, texts, others = [], [], [], Counter[str]()
    for path in sorted(walk, key=lambda path: path.relative_to(folder).as_posix()):
        kind = _kind(path)
        if kind in IMAGES:
            images.append(path)
        elif kind in SIDECARS:
            texts.append(path)
        elif path.name in METADATA:
            metadata.append(path)
        else:
            others[f".{escape_name(kind)}" if kind else "no suffix"] += 1
    if not images and not walk.closed:
        fix = "give a folder of png, jpg, webp, tif or bmp files"
        raise InputError(f"{folder}: no image in this folder", fix=fix)
    return Listing(
        folder,
        tuple(images),
        tuple(metadata),
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

    def _real(self, folders: list[Path], links: list[Path]) -> Iterator[Path]:
        while folders:
            folder = folders.pop()
            try:
                self.seen.add(_identity(folder))
                entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
            except OSError as error:
                self.closed.append((folder, f"the folder cannot be read: {error.strerror}"))
                continue
            for entry in entries:
                path = Path(entry.path)
                is_dead_link = entry.is_symlink() and not os.path.exists(path)
                if is_dead_link and _kind(path) not in FILES:
                    self.closed.append((path, "the link leads nowhere"))
                elif not entry.is_dir():
                    yield path
                else:
                    (links if entry.is_symlink() else folders).append(path)


def _identity(folder: Path) -> Identity:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino
