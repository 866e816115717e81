"""Folders of images: listed with their links, checked from heads and tails, decoded when asked for."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from demerge.data.arrays import Source
from demerge.data.captions import read_captions
from demerge.data.decode import Header, Least, check, decode
from demerge.data.layout import class_labels, layout
from demerge.data.listing import Listing, escaped, list_folder
from demerge.data.values import Pixels8, Shape
from demerge.errors import InputError
from demerge.storage.atomic import sha256
from demerge.storage.hashing import remembered


@dataclass(frozen=True, slots=True)
class Files:
    """Image files that are decoded one by one."""

    paths: tuple[Path, ...]
    headers: tuple[Header, ...]

    @property
    def resident(self) -> bool:
        """False: reading decodes a file."""
        return False

    @property
    def shapes(self) -> frozenset[Shape]:
        """The shapes [C H W] of all, from their headers."""
        return frozenset((h.channels, h.height, h.width) for h in self.headers)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, least: Least | None = None) -> Pixels8:
        """Return image `index`, [C H W].

        Raises:
            InputError: if the file is damaged.
        """
        return decode(self.paths[index], least)


def read_folder(folder: Path, *, skip_broken: bool = False) -> Source:
    """Read a folder of images, recursively, sorted by name; see `demerge.data.layout` for its splits and classes.

    Broken files are found from heads and tails; with `skip_broken` every file is decoded, and what fails is left out.

    Raises:
        InputError: if there is no image, or files are broken; it lists the first ten.
    """
    listing = list_folder(folder)
    paths = listing.images
    headers, broken = {}, {}
    for path in paths:
        try:
            headers[path] = check(path)
            if skip_broken:
                decode(path, (1, 1))
        except InputError as error:
            broken[path] = error
    if (broken or listing.closed) and (not skip_broken or not headers):
        raise _broken(listing, list(broken.values()))
    good = [path for path in paths if path not in broken]
    captions, parts = read_captions(listing, good), layout(folder, good)
    labels = class_labels(folder, good, paths, parts.depth)
    pixels = Files(tuple(good), tuple(headers[path] for path in good))
    name = escaped(folder.resolve().name)
    return Source(
        name,
        pixels,
        _content(listing, good, captions, labels),
        parts.test,
        captions,
        labels,
        parts.spare,
    )


def _content(
    listing: Listing, paths: Sequence[Path], captions: list[str] | None, labels: list[int] | None
) -> str:
    """Hash the names and the whole content of the files, their captions and labels."""
    digest = hashlib.sha256("\0".join(map(listing.name, paths)).encode())
    digest.update(remembered("contents", paths, lambda: _contents(paths)).encode())
    digest.update(repr((captions, labels)).encode())
    return digest.hexdigest()


def _contents(paths: Sequence[Path]) -> str:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return hashlib.sha256("".join(pool.map(sha256, paths)).encode()).hexdigest()


def kinds_of(names: Sequence[str]) -> str:
    """Count names by suffix: `heic 3, png 1`."""
    counts = Counter(Path(name).suffix.lower().removeprefix(".") or "no suffix" for name in names)
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.most_common())


def _broken(listing: Listing, errors: Sequence[InputError]) -> InputError:
    total, folder = len(listing.images), listing.folder
    lines = [
        *(f"{path}: {reason}" for path, reason in listing.closed),
        *(error.what for error in errors),
    ]
    shown = [f"  {line}" for line in lines[:10]]
    if len(lines) > 10:
        shown.append(f"  and {len(lines) - 10} more")
    closed = f" and {len(listing.closed)} folders" if listing.closed else ""
    what = f"{folder}: {len(errors)} of {total} images{closed} cannot be read:\n" + "\n".join(shown)
    fix = f"'demerge data check {folder}' lists them; convert, replace or remove them"
    return InputError(
        what, fix=fix if len(errors) == total else f"{fix}, or leave them out with --skip-broken"
    )
