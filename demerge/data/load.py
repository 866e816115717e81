"""From the words a user gives to a data set: find the kind of source, read it, split it, fit it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from demerge.data.arrays import (
    Source,
    is_cifar,
    is_idx,
    read_cifar,
    read_digits,
    read_idx,
    read_npz,
)
from demerge.data.folder import read_folder
from demerge.data.hub import read_hub
from demerge.data.values import ImageData, Shape
from demerge.errors import InputError, UsageError
from demerge.randomness import permutation

SPLITS = ("all", "train", "test")
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
        source: `digits`, `hf:NAME[:CONFIG]`, a folder of images, CIFAR-10 batches, idx files or an `.npz`.
        split: `all`, `train` or `test`. A source's own test split is used (of a folder: `test/`, or else
            `validation/`, also by their other names); without one, a tenth of the images, drawn by a fixed key, is that.
        resolution: height and width in pixels; None keeps the source's, which must then be one.
        channels: 1 or 3; None keeps the source's.
        limit: at most so many images, drawn evenly by a fixed key; smaller choices are contained in larger ones.
        skip_broken: decode every file of a folder first and leave out those that cannot be read.

    Raises:
        UsageError: where an argument is out of its range.
        InputError: where the source is missing, empty or damaged.
    """
    _check_arguments(split, resolution, channels, limit)
    read = read_source(source, skip_broken=skip_broken)
    shape = _shape(read, resolution, channels)
    n = len(read.pixels)
    name = read.name.encode("utf-8", "replace").decode()  # as records can hold it
    data = ImageData(
        name, split, shape, read.content, read.pixels, tuple(range(n)), read.captions, read.labels
    )
    chosen = split_positions(n, read.test, split, read.spare)
    if limit is not None and limit < len(chosen):
        chosen = sorted(chosen[i] for i in permutation(len(chosen), 0, "limit")[:limit])
    if not chosen:
        raise InputError(
            f"{source}: the split '{split}' of {n} images is empty",
            fix="use a larger source or split 'all'",
        )
    return data.subset(chosen)


def read_source(source: str | Path, *, skip_broken: bool = False) -> Source:
    """Read what a user's word for a source stands for.

    Raises:
        InputError: where it is missing, empty or damaged.
    """
    text, path = str(source), Path(source)
    if text == "digits":
        return read_digits()
    if text.startswith("hf:"):
        return read_hub(text)
    if not path.exists():
        raise InputError(
            f"data source '{text}' is neither a known name nor a file or folder",
            fix=f"give {KINDS}",
        )
    if path.is_dir():
        if is_cifar(path):
            return read_cifar(path)
        if is_idx(path):
            return read_idx(path)
        return read_folder(path, skip_broken=skip_broken)
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
    if split not in SPLITS:
        raise UsageError(f"split '{split}' is unknown", fix=f"use one of {', '.join(SPLITS)}")
    if resolution is not None and not 1 <= resolution <= 8192:
        raise UsageError(
            f"resolution {resolution} lies outside 1..8192",
            fix="give the model's resolution in pixels",
        )
    if channels not in (None, 1, 3):
        raise UsageError(f"{channels} channels cannot be made", fix="give 1 (grey) or 3 (colour)")
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit} leaves no image", fix="give at least 1")


def split_positions(
    n: int, test: Sequence[int] | None, split: str, spare: Sequence[int] = ()
) -> list[int]:
    """Return the positions of a split of n images; `test` None holds a tenth out by a fixed key, `spare` is in neither."""
    tenth = max(1, round(n * HELD_OUT)) if n > 1 else 0
    held = set(permutation(n, 0, "held-out")[:tenth] if test is None else test)
    neither = held | set(spare)
    train = [i for i in range(n) if i not in neither]
    return {"train": train, "test": sorted(held), "all": list(range(n))}[split]


def _shape(source: Source, resolution: int | None, channels: int | None) -> Shape:
    shapes = source.pixels.shapes
    sizes = sorted({(h, w) for _, h, w in shapes})
    if resolution is None and len(sizes) > 1:
        (a, b), (c, d) = sizes[0], sizes[-1]
        raise UsageError(
            f"{source.name}: images of {len(sizes)} sizes, from {b} x {a} to {d} x {c}",
            fix="give one resolution for all",
        )
    height, width = (resolution, resolution) if resolution is not None else sizes[0]
    return channels or max(c for c, _, _ in shapes), height, width
