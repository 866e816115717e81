"""Folders of images: listed with their links, checked from heads and tails, decoded on demand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from demerge.data.captions import read_captions
from demerge.data.decode import Header, decode, read_header
from demerge.data.layout import class_labels, find_splits
from demerge.data.listing import Listing, escape_name, list_folder
from demerge.data.values import Least, Pixels8, Shape, Source
from demerge.errors import InputError
from demerge.progress import Progress, silent
from demerge.storage.atomic import sha256
from demerge.storage.hashing import remembered

SHOWN = 10


@dataclass(frozen=True, slots=True)
class Files:
    """Image files that are decoded one by one."""

    paths: tuple[Path, ...]
    headers: tuple[Header, ...]
    resident: ClassVar[bool] = False

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
    """Read a folder of images and its subfolders, sorted by name; see `demerge.data.layout`.

    Args:
        skip_broken: decode every file and leave out those that fail. Otherwise broken files are
            found from heads and tails.
    """
    listing = list_folder(folder)
    headers, errors = read_headers(listing, whole=skip_broken)
    if (errors or listing.closed) and (not skip_broken or not headers):
        raise _broken(listing, list(errors.values()))
    paths = tuple(headers)
    captions, splits = read_captions(listing, paths), find_splits(folder, paths)
    labels = class_labels(folder, paths, listing.images, splits.depth)
    digest = hashlib.sha256("\0".join(map(listing.name, paths)).encode())
    digest.update(remembered("contents", paths, lambda: _hash_files(paths)).encode())
    digest.update(repr((captions, labels)).encode())
    name, pixels = escape_name(folder.resolve().name), Files(paths, tuple(headers.values()))
    content = digest.hexdigest()
    return Source(name, pixels, content, splits, captions, labels)


def read_headers(
    listing: Listing, *, whole: bool, progress: Progress = silent
) -> tuple[dict[Path, Header], dict[Path, InputError]]:
    """Return the headers of the images that can be read, and the errors of the others.

    Args:
        whole: decode every image; otherwise broken ones are found from heads and tails.
    """
    headers, errors = {}, {}
    for done, path in enumerate(listing.images, start=1):
        try:
            header = read_header(path)
            if whole:
                decode(path, (1, 1))
            headers[path] = header
        except InputError as error:
            errors[path] = error
        broken = len(errors) + len(listing.closed)
        progress(done, len(listing.images), f"{broken} broken" if broken else "")
    return headers, errors


def _hash_files(paths: Sequence[Path]) -> str:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return hashlib.sha256("".join(pool.map(sha256, paths)).encode()).hexdigest()


def _broken(listing: Listing, errors: Sequence[InputError]) -> InputError:
    total, folder = len(listing.images), listing.folder
    lines = [f"{path}: {reason}" for path, reason in listing.closed]
    lines += [error.what for error in errors]
    closed = f" and {len(listing.closed)} folders" if listing.closed else ""
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    what = f"{folder}: {len(errors)} of {total} images{closed} cannot be read:\n"
    what += "\n".join(f"  {line}" for line in [*lines[:SHOWN], *more])
    fix = f"'demerge data check {folder}' lists them; convert, replace or remove them"
    if len(errors) < total:
        fix += ", or leave them out with --skip-broken"
    return InputError(what, fix=fix)
