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
    images: list[Path]
    metadata: list[Path]
    texts: list[Path]
    others: dict[str, int]
    linked: list[Path]
    left_out: list[Path]
    closed: list[tuple[Path, str]]

    def name(self, path: Path) -> str:
        """Return the name of a file relative to the folder, as `escape_name` writes it."""
        return escape_name(path.relative_to(self.folder).as_posix())


def escape_name(name: str) -> str:
    """Return a file name as text that UTF-8 can hold; a byte that is not UTF-8 becomes its code."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def list_folder(folder: Path) -> Listing:
    """List a folder."""
    seen = {_identity(parent) for parent in folder.resolve().parents}
    files: list[Path] = []
    closed: list[tuple[Path, str]] = []
    linked, left_out, roots = [], [], [folder]
    while roots:
        root = roots.pop(0)
        if _identity(root) in seen:
            left_out.append(root)
            continue
        linked.append(root)
        links: list[Path] = []
        files += _walk(root, seen, links, closed)
        roots = sorted([*roots, *links])
    images, metadata, texts, others = [], [], [], Counter[str]()
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        kind = suffix_of(path)
        if kind in IMAGES:
            images.append(path)
        elif kind in SIDECARS:
            texts.append(path)
        elif path.name in METADATA:
            metadata.append(path)
        else:
            others[f".{escape_name(kind)}" if kind else "no suffix"] += 1
    if not images and not closed:
        fix = "give a folder of png, jpg, webp, tif or bmp files"
        raise InputError(f"{folder}: no image in this folder", fix=fix)
    return Listing(folder, images, metadata, texts, dict(others), linked[1:], left_out, closed)


def suffix_of(path: str | Path) -> str:
    """Return a file's suffix in small letters, without its dot."""
    return Path(path).suffix.lower().removeprefix(".")


def _walk(
    root: Path, seen: set[Identity], links: list[Path], closed: list[tuple[Path, str]]
) -> Iterator[Path]:
    """Yield the files below a folder; linked folders go to `links`, unreadable ones to `closed`."""
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            seen.add(_identity(folder))
            entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        except OSError as error:
            closed.append((folder, f"the folder cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            path = Path(entry.path)
            is_dead_link = entry.is_symlink() and not os.path.exists(path)
            if is_dead_link and suffix_of(path) not in FILES:
                closed.append((path, "the link leads nowhere"))
            elif not entry.is_dir():
                yield path
            else:
                (links if entry.is_symlink() else folders).append(path)


def _identity(folder: Path) -> Identity:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino
