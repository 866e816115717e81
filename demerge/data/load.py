"""The word a user gives for a source, to a data set: find the kind, read it, split it, fit it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from demerge.data.arrays import is_cifar, is_idx, read_cifar, read_digits, read_idx, read_npz
from demerge.data.folder import read_folder
from demerge.data.hub import read_hub
from demerge.data.layout import Splits
from demerge.data.values import ImageData, Shape, Source
from demerge.errors import InputError, UsageError
from demerge.options import Split
from demerge.randomness import permutation

HELD_OUT = 0.1
KINDS = "digits, hf:NAME, a folder of images, CIFAR-10 .bin batches, idx files (.gz too) or an .npz"


def load_images(
    source: str | Path,
    *,
    split: str = "all",
    resolution: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
    skip_broken: bool = False,
) -> ImageData:
    """Read a source of images.

    Args:
        source: `digits`, `hf:NAME[:CONFIG]`, a folder of images, CIFAR-10 batches, idx files or an
            `.npz`.
        split: `all`, `train` or `test`. A source's own test split is used. Without one, the test
            is a tenth of the images, drawn by a fixed key.
        resolution: height and width in pixels; None keeps the source's, which must be the same
            for all images.
        channels: 1 or 3; None keeps the source's.
        limit: the most images, drawn by a fixed key; smaller choices are part of larger ones.
        skip_broken: decode every file of a folder first and leave out those that cannot be read.

    Raises:
        UsageError: if an argument is out of range.
        InputError: if the source is missing, empty or damaged.
    """
    _check_arguments(split, resolution, channels, limit)
    read = read_source(source, skip_broken=skip_broken)
    shape = _shape(read, resolution, channels)
    n = len(read.pixels)
    name = read.name.encode("utf-8", "replace").decode()  # as records can hold it
    every, pixels, content = tuple(range(n)), read.pixels, read.content
    data = ImageData(name, split, shape, content, pixels, every, read.captions, read.labels)
    positions = split_positions(n, read.splits, split)
    if limit is not None and limit < len(positions):
        drawn = permutation(len(positions), 0, "limit")[:limit]
        positions = sorted(positions[i] for i in drawn)
    if not positions:
        what = f"{source}: the split '{split}' of {n} images is empty"
        raise InputError(what, fix="use a larger source or split 'all'")
    return data.subset(positions)


def read_source(source: str | Path, *, skip_broken: bool = False) -> Source:
    """Read the source that a user's word stands for."""
    text, path = str(source), Path(source)
    if text == "digits":
        return read_digits()
    if text.startswith("hf:"):
        return read_hub(text)
    if not path.exists():
        what = f"data source '{text}' is neither a known name nor a file or folder"
        raise InputError(what, fix=f"give {KINDS}")
    if path.is_dir():
        if is_cifar(path):
            return read_cifar(path)
        return read_idx(path) if is_idx(path) else read_folder(path, skip_broken=skip_broken)
    if path.suffix == ".bin":
        return read_cifar(path)
    if path.suffix == ".npz":
        return read_npz(path)
    if "idx3" in path.name:
        return read_idx(path)
    raise InputError(f"{path}: not a source of images", fix=f"give {KINDS}")


def _check_arguments(
    split: str, resolution: int | None, channels: int | None, limit: int | None
) -> None:
    if split not in get_args(Split):
        raise UsageError(f"split '{split}' is unknown", fix=f"use {', '.join(get_args(Split))}")
    if resolution is not None and not 1 <= resolution <= 8192:
        fix = "give the model's resolution in pixels, from 1 to 8192"
        raise UsageError(f"resolution is {resolution}", fix=fix)
    if channels not in (None, 1, 3):
        raise UsageError(f"channels is {channels}", fix="give 1 (grey) or 3 (colour)")
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}", fix="give at least 1")


def split_positions(n: int, splits: Splits, split: str) -> list[int]:
    """Return the positions of a split of n images; without a test split a tenth is drawn."""
    if split == "all":
        return list(range(n))
    test: Sequence[int] | None = splits.test
    if test is None:
        tenth = max(1, round(n * HELD_OUT)) if n > 1 else 0
        test = permutation(n, 0, "held-out")[:tenth]
    if split == "test":
        return sorted(test)
    outside = {*test, *splits.spare}
    return [i for i in range(n) if i not in outside]


def _shape(source: Source, resolution: int | None, channels: int | None) -> Shape:
    shapes = source.pixels.shapes
    sizes = sorted({(h, w) for _, h, w in shapes})
    if resolution is None and len(sizes) > 1:
        (a, b), (c, d) = sizes[0], sizes[-1]
        what = f"{source.name}: images of {len(sizes)} sizes, from {b} x {a} to {d} x {c}"
        raise UsageError(what, fix="give one resolution for all")
    height, width = (resolution, resolution) if resolution is not None else sizes[0]
    return channels or max(c for c, _, _ in shapes), height, width
