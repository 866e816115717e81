"""Folders of images: listed with their links, checked from heads and tails, decoded on demand."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from demerge.data.captions import read_captions
from demerge.data.decode import Header, decode, read_header
from demerge.data.layout import class_labels, find_splits
from demerge.data.listing import Listing, escape_name, list_folder
from demerge.data.values import Least, Pixels8, Shape, Source
from demerge.errors import InputError
from demerge.storage.atomic import sha256
from demerge.storage.hashing import remembered

SHOWN = 10


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
        """Return image `index`, [C H W]."""
        return decode(self.paths[index], least)


def read_folder(folder: Path, *, skip_broken: bool = False) -> Source:
    """Read a folder of images and its subfolders, sorted by name.

    `demerge.data.layout` defines its splits and classes.

    Args:
        skip_broken: decode every file and leave out those that fail. Otherwise broken files are
            found from heads and tails.
    """
    listing = list_folder(folder)
    headers, errors = {}, []
    for path in listing.images:
        try:
            header = read_header(path)
            if skip_broken:
                decode(path, (1, 1))
            headers[path] = header
        except InputError as error:
            errors.append(error)
    if (errors or listing.closed) and (not skip_broken or not headers):
        raise _broken(listing, errors)
    paths = tuple(headers)
    captions, splits = read_captions(listing, paths), find_splits(folder, paths)
    labels = class_labels(folder, paths, listing.images, splits.depth)
    digest = hashlib.sha256("\0".join(map(listing.name, paths)).encode())
    digest.update(remembered("contents", paths, lambda: _hash_files(paths)).encode())
    digest.update(repr((captions, labels)).encode())
    return Source(
        escape_name(folder.resolve().name),
        Files(paths, tuple(headers.values())),
        digest.hexdigest(),
        splits.test,
        captions,
        labels,
        splits.spare,
    )


def _hash_files(paths: Sequence[Path]) -> str:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return hashlib.sha256("".join(pool.map(sha256, paths)).encode()).hexdigest()


def count_kinds(names: Sequence[str]) -> str:
    """Count names by suffix: `heic 3, png 1`."""
    counts = Counter(Path(name).suffix.lower().removeprefix(".") or "no suffix" for name in names)
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.most_common())


def _broken(listing: Listing, errors: Sequence[InputError]) -> InputError:
    total, folder = len(listing.images), listing.folder
    lines = [f"{path}: {reason}" for path, reason in listing.closed]
    lines += [error.what for error in errors]
    closed = f" and {len(listing.closed)} folders" if listing.closed else ""
    what = f"{folder}: {len(errors)} of {total} images{closed} cannot be read:\n"
    what += "\n".join(f"  {line}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        what += f"\n  and {len(lines) - SHOWN} more"
    fix = f"'demerge data check {folder}' lists them; convert, replace or remove them"
    if len(errors) < total:
        fix += ", or leave them out with --skip-broken"
    return InputError(what, fix=fix)
