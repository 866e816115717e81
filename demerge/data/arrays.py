"""Sources that are one array: CIFAR-10's binary batches, idx files, npz, and scikit-learn's digits.

CIFAR-10: records of 1 label and 3,072 pixel bytes, [3 32 32] each (https://www.cs.toronto.edu/~kriz/cifar.html).
idx: two zero bytes, type, number of dimensions, big-endian sizes, values (LeCun's MNIST page).
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from demerge.data.values import Array, Pixels, Pixels8
from demerge.errors import InputError
from demerge.randomness import permutation

CIFAR_RECORD = 1 + 3 * 32 * 32
CIFAR_FIX = "fetch cifar-10-binary.tar.gz again and unpack it"
DIGITS_TEST = 500
MAX_PIXEL_BYTES = 16 << 30


@dataclass(frozen=True, slots=True)
class Source:
    """All images of a source; `test` are the positions of its own test split, None if it has none; `spare` are in neither."""

    name: str
    pixels: Pixels
    content: str
    test: tuple[int, ...] | None = None
    captions: list[str] | None = None
    labels: list[int] | None = None
    spare: tuple[int, ...] = ()


def read_digits() -> Source:
    """Read scikit-learn's 1,797 digits, 8 x 8, values 0..16 scaled to 0..255; 500 of them are the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    test = sorted(permutation(len(images), 0, "digits-test")[:DIGITS_TEST])
    return array_source("digits", images, bunch.target, tuple(test))


def read_cifar(path: Path) -> Source:
    """Read one CIFAR-10 batch, or a folder with `data_batch_*.bin` and `test_batch.bin`.

    Raises:
        InputError: where a batch is empty, truncated or has a label above 9.
    """
    if path.is_file():
        images, labels = _cifar_batch(path)
        return array_source(path.stem, images, labels)
    train, test = sorted(path.glob("data_batch_*.bin")), sorted(path.glob("test_batch.bin"))
    parts = [_cifar_batch(file) for file in [*train, *test]]
    sizes = [len(labels) for _, labels in parts]
    held = tuple(range(sum(sizes[: len(train)]), sum(sizes))) if train and test else None
    return array_source(
        path.name,
        np.concatenate([p[0] for p in parts]),
        np.concatenate([p[1] for p in parts]),
        held,
    )


def is_cifar(folder: Path) -> bool:
    """Say whether a folder holds CIFAR-10 batches."""
    return any(folder.glob("data_batch_*.bin")) or (folder / "test_batch.bin").is_file()


def _cifar_batch(file: Path) -> tuple[Pixels8, Pixels8]:
    values = np.fromfile(file, dtype=np.uint8)
    if not len(values) or len(values) % CIFAR_RECORD:
        raise InputError(
            f"{file}: {len(values):,} bytes are no whole number of {CIFAR_RECORD}-byte records",
            fix=CIFAR_FIX,
        )
    records = values.reshape(-1, CIFAR_RECORD)
    if records[:, 0].max() > 9:
        raise InputError(
            f"{file}: label {records[:, 0].max()} is not one of 0..9, no CIFAR-10 batch",
            fix=CIFAR_FIX,
        )
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def read_idx(path: Path) -> Source:
    """Read an idx file of images, or a folder with `train-images-idx3-ubyte` and `t10k-images-idx3-ubyte`; `.gz` too.

    Raises:
        InputError: where a file is truncated, holds no bytes in 3 dimensions, or labels do not match the images.
    """
    if path.is_file():
        return array_source(path.name.split(".")[0], _idx_images(path), _idx_labels(path))
    train, test = (_idx_file(path, part) for part in ("train", "t10k"))
    files = [file for file in (train, test) if file is not None]
    images = [_idx_images(file) for file in files]
    if len({part.shape[1:] for part in images}) > 1:
        raise InputError(
            f"{path}: train and t10k images differ in size", fix="use files of one data set"
        )
    labels = [_idx_labels(file) for file in files]
    known = [part for part in labels if part is not None]
    held = (
        tuple(range(len(images[0]), len(images[0]) + len(images[1]))) if len(images) == 2 else None
    )
    return array_source(
        path.name,
        np.concatenate(images),
        np.concatenate(known) if len(known) == len(files) else None,
        held,
    )


def is_idx(folder: Path) -> bool:
    """Say whether a folder holds idx files of images."""
    return any(_idx_file(folder, part) for part in ("train", "t10k"))


def _idx_file(folder: Path, part: str) -> Path | None:
    names = [f"{part}-images{dot}idx3-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx_images(file: Path) -> Pixels8:
    return _idx_values(file, 3)[:, None]


def _idx_labels(images: Path) -> Pixels8 | None:
    file = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    if file == images or not file.is_file():
        return None
    labels, count = _idx_values(file, 1), len(_idx_values(images, 3))
    if len(labels) != count:
        raise InputError(
            f"{file}: {len(labels)} labels for {count} images",
            fix="use labels of the same data set",
        )
    return labels


def _idx_values(file: Path, dims: int) -> Pixels8:
    raw = _unzipped(file)
    head = 4 + 4 * dims
    if len(raw) < head or raw[:2] != b"\0\0" or raw[2] != 8 or raw[3] != dims:
        raise InputError(
            f"{file}: no idx file of bytes in {dims} dimensions", fix="use MNIST-like idx files"
        )
    shape = struct.unpack(f">{dims}I", raw[4:head])
    if math.prod(shape) != len(raw) - head or 0 in shape:
        raise InputError(
            f"{file}: header says {shape}, the file holds {len(raw) - head:,} values",
            fix="fetch it again",
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=head).reshape(shape)


def _unzipped(file: Path) -> bytes:
    try:
        if file.suffix != ".gz":
            return file.read_bytes()
        with gzip.open(file) as stream:
            raw = stream.read(MAX_PIXEL_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read: {error}", fix="fetch it again") from error
    return raw


def read_npz(path: Path) -> Source:
    """Read uint8 images [N H W C], [N C H W] or [N H W] from the key `images` or `arr_0`, and integer `labels`.

    Raises:
        InputError: where the file is damaged, pickled, or holds anything else.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            key = next((k for k in ("images", "arr_0") if k in archive.files), None)
            if key is None:
                raise InputError(
                    f"{path}: no key 'images' or 'arr_0' among {archive.files[:8]}",
                    fix="name the array 'images'",
                )
            images = archive[key]
            labels = archive["labels"] if "labels" in archive.files else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise InputError(
            f"{path}: no readable npz: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            fix="write it with numpy.savez(path, images=array), uint8, no objects",
        ) from error
    if labels is not None and labels.shape != (len(images),):
        raise InputError(
            f"{path}: labels {labels.shape} do not match {len(images)} images",
            fix="give one label per image",
        )
    return array_source(path.stem, _channels_first(path, key, images), labels)


def _channels_first(path: Path, key: str, images: NDArray[np.generic]) -> Pixels8:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
        raise InputError(
            f"{path}: '{key}' is {images.dtype} {list(images.shape)}",
            fix="give uint8 images [N H W C], [N C H W] or [N H W]",
        )
    values = images.astype(np.uint8, copy=False)
    if values.ndim == 3:
        return values[:, None]
    if values.shape[3] in (1, 3):
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    if values.shape[1] in (1, 3):
        return values
    raise InputError(
        f"{path}: '{key}' {list(values.shape)} has neither 1 nor 3 channels",
        fix="drop other channels, as alpha",
    )


def array_source(
    name: str,
    images: Pixels8,
    labels: NDArray[np.integer] | None,
    test: tuple[int, ...] | None = None,
) -> Source:
    """Wrap images [N C H W]; the content's hash covers shape, pixels and labels."""
    digest = hashlib.sha256(str(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    listed = None if labels is None else [int(label) for label in labels]
    digest.update(str(listed).encode())
    return Source(name, Array(images), digest.hexdigest(), test, labels=listed)
