"""Sources that are one array: CIFAR-10's binary batches, idx files, npz, and scikit-learn's digits.

CIFAR-10: records of 1 label and 3,072 pixel bytes, [3 32 32] each
(https://www.cs.toronto.edu/~kriz/cifar.html).
idx: two zero bytes, type, number of dimensions, big-endian sizes, values (LeCun's MNIST page).
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from demerge.data.layout import Splits
from demerge.data.values import Array, Pixels8, Source
from demerge.errors import InputError
from demerge.randomness import permutation

CIFAR_RECORD = 1 + 3 * 32 * 32
CIFAR_FIX = "fetch cifar-10-binary.tar.gz again and unpack it"
DIGITS_TEST = 500
MAX_PIXEL_BYTES = 16 << 30

Part = list[tuple[Pixels8, Pixels8 | None]]  # arrays of images and labels
Test = tuple[int, ...] | None  # positions of the test split


@cache  # its text takes scikit-learn a while
def read_digits() -> Source:
    """Read scikit-learn's 1,797 digits, 8 x 8, values 0..16 scaled to 0..255; 500 are the test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    test = sorted(permutation(len(images), 0, "digits-test")[:DIGITS_TEST])
    return array_source("digits", images, bunch.target, tuple(test))


def read_cifar(path: Path) -> Source:
    """Read one CIFAR-10 batch, or a folder with `data_batch_*.bin` and `test_batch.bin`."""
    if path.is_file():
        return array_source(path.stem, *_cifar_batch(path))
    train: Part = [_cifar_batch(file) for file in sorted(path.glob("data_batch_*.bin"))]
    test: Part = [_cifar_batch(file) for file in path.glob("test_batch.bin")]
    return _joined(path.name, train, test)


def is_cifar(folder: Path) -> bool:
    """Return whether a folder holds CIFAR-10 batches."""
    return any(folder.glob("data_batch_*.bin")) or (folder / "test_batch.bin").is_file()


def _cifar_batch(file: Path) -> tuple[Pixels8, Pixels8]:
    values = np.fromfile(file, dtype=np.uint8)
    if not len(values) or len(values) % CIFAR_RECORD:
        what = f"{len(values):,} bytes are not a whole number of {CIFAR_RECORD}-byte records"
        raise InputError(f"{file}: {what}", fix=CIFAR_FIX)
    records = values.reshape(-1, CIFAR_RECORD)
    if (largest := records[:, 0].max()) > 9:
        raise InputError(f"{file}: label {largest} is not in 0..9", fix=CIFAR_FIX)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def read_idx(path: Path) -> Source:
    """Read an idx file of images, `.gz` too, or a folder with MNIST's train and t10k files."""
    if path.is_file():
        return array_source(path.name.split(".")[0], *_idx_pair(path))
    files = [_idx_file(path, part) for part in ("train", "t10k")]
    parts = [[] if file is None else [_idx_pair(file)] for file in files]
    if len({images.shape[1:] for part in parts for images, _ in part}) > 1:
        what = f"{path}: train and t10k images differ in size"
        raise InputError(what, fix="use files of one data set")
    return _joined(path.name, *parts)


def is_idx(folder: Path) -> bool:
    """Return whether a folder holds idx files of images."""
    return any(_idx_file(folder, part) for part in ("train", "t10k"))


def _idx_file(folder: Path, part: str) -> Path | None:
    names = [f"{part}-images{dot}idx3-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx_pair(file: Path) -> tuple[Pixels8, Pixels8 | None]:
    """Return the images [N 1 H W] of a file, and the labels next to it if there are any."""
    images = _idx_values(file, 3)[:, None]
    at = file.with_name(file.name.replace("images", "labels").replace("idx3", "idx1"))
    if at == file or not at.is_file():
        return images, None
    labels = _idx_values(at, 1)
    if len(labels) != len(images):
        what = f"{at}: {len(labels)} labels for {len(images)} images"
        raise InputError(what, fix="use labels of the same data set")
    return images, labels


def _idx_values(file: Path, dims: int) -> Pixels8:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            raw = stream.read(MAX_PIXEL_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read: {error}", fix="fetch it again") from error
    head = 4 + 4 * dims
    if len(raw) < head or raw[:2] != b"\0\0" or raw[2] != 8 or raw[3] != dims:
        what = f"{file}: not an idx file of bytes in {dims} dimensions"
        raise InputError(what, fix="use MNIST-like idx files")
    shape = struct.unpack(f">{dims}I", raw[4:head])
    if math.prod(shape) != len(raw) - head or 0 in shape:
        what = f"{file}: header says {shape}, the file holds {len(raw) - head:,} values"
        raise InputError(what, fix="fetch it again")
    return np.frombuffer(raw, dtype=np.uint8, offset=head).reshape(shape)


def read_npz(path: Path) -> Source:
    """Read uint8 images [N H W C], [N C H W] or [N H W] and, if there are any, integer labels."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            key = next((k for k in ("images", "arr_0") if k in archive.files), None)
            if key is None:
                what = f"{path}: no key 'images' or 'arr_0' among {archive.files[:8]}"
                raise InputError(what, fix="name the array 'images'")
            images = archive[key]
            labels = archive["labels"] if "labels" in archive.files else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "write it with numpy.savez(path, images=array), uint8, no objects"
        raise InputError(f"{path}: not a readable npz: {reason}", fix=fix) from error
    if labels is not None and labels.shape != (len(images),):
        what = f"{path}: labels {labels.shape} do not match {len(images)} images"
        raise InputError(what, fix="give one label per image")
    return array_source(path.stem, _channels_first(path, key, images), labels)


def _channels_first(path: Path, key: str, images: NDArray[np.generic]) -> Pixels8:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
        fix = "give uint8 images [N H W C], [N C H W] or [N H W]"
        raise InputError(f"{path}: '{key}' is {images.dtype} {list(images.shape)}", fix=fix)
    values = images.astype(np.uint8, copy=False)
    if values.ndim == 3:
        return values[:, None]
    if values.shape[3] in (1, 3):
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    if values.shape[1] in (1, 3):
        return values
    what = f"{path}: '{key}' {list(values.shape)} has neither 1 nor 3 channels"
    raise InputError(what, fix="drop other channels, as alpha")


def _joined(name: str, train: Part, test: Part) -> Source:
    images = [images for images, _ in [*train, *test]]
    labels = [labels for _, labels in [*train, *test] if labels is not None]
    first, n = sum(len(part) for part, _ in train), sum(map(len, images))
    held = tuple(range(first, n)) if train and test else None
    known = np.concatenate(labels) if len(labels) == len(images) else None
    return array_source(name, np.concatenate(images), known, held)


def array_source(
    name: str, images: Pixels8, labels: NDArray[np.integer] | None, test: Test = None
) -> Source:
    """Return images [N C H W] as a source; its hash covers shape, pixels, labels."""
    digest = hashlib.sha256(str(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    plain = None if labels is None else [int(label) for label in labels]
    digest.update(str(plain).encode())
    return Source(name, Array(images), digest.hexdigest(), Splits(test=test), labels=plain)
