"""A data set: pixels that are read one by one, and the images among them that a stage works on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from demerge.data.layout import Splits

Pixels8 = NDArray[np.uint8]
Shape = tuple[int, int, int]
Least = tuple[int, int]

CACHE_BYTES = 1 << 30


class Pixels(Protocol):
    """Images that are read one by one, as uint8 [C H W] with C = 1 or 3; sizes may differ."""

    resident: ClassVar[bool]  # whether they are in memory, so that reading costs nothing

    @property
    def shapes(self) -> frozenset[Shape]:
        """The shapes [C H W] that occur, as far as they are known without decoding all."""

    def __len__(self) -> int: ...

    def read(self, index: int, least: Least | None = None) -> Pixels8:
        """Return image `index`, [C H W]; a big one may be scaled down to twice `least` or more."""


@dataclass(frozen=True, slots=True)
class Array:
    """Images of one size in memory, [N C H W]."""

    values: Pixels8
    resident: ClassVar[bool] = True

    @property
    def shapes(self) -> frozenset[Shape]:
        """The one shape [C H W] of all."""
        _, *shape = self.values.shape
        return frozenset([tuple(shape)])

    def __len__(self) -> int:
        return len(self.values)

    def read(self, index: int, least: Least | None = None) -> Pixels8:
        """Return image `index`, [C H W]."""
        image: Pixels8 = self.values[index]
        return image


@dataclass(frozen=True, slots=True)
class Source:
    """All images of a source."""

    name: str
    pixels: Pixels
    content: str  # SHA-256 of pixels, captions and labels
    splits: Splits
    captions: list[str] | None = None
    labels: list[int] | None = None


@dataclass(frozen=True, slots=True)
class ImageData:
    """N images of one shape, with captions and labels if the source has them.

    Attributes:
        name: the name of the source: `digits`, the name of a folder or file, `hf:NAME`.
        split: `all`, `train` or `test`.
        shape: [C H W] of every image.
        content: SHA-256 of the source's pixels and captions.
        positions: the position of image i in `pixels`.
    """

    name: str
    split: str
    shape: Shape
    content: str
    pixels: Pixels = field(repr=False)
    positions: tuple[int, ...] = field(repr=False)
    captions: list[str] | None = field(default=None, repr=False)
    labels: list[int] | None = field(default=None, repr=False)
    _cache: dict[int, Pixels8] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the pixels, the choice of images and their shape."""
        text = f"{self.content} {self.shape} {self.positions}"
        return hashlib.sha256(text.encode()).hexdigest()

    def images(self, indices: Sequence[int]) -> Tensor:
        """Return the images at `indices`, uint8 [B C H W] in [0, 255]."""
        if not indices:
            return torch.empty(0, *self.shape, dtype=torch.uint8)
        return torch.from_numpy(np.stack([self._image(self.positions[i]) for i in indices]))

    def floats(self, indices: Sequence[int], flip: Sequence[bool] | None = None) -> Tensor:
        """Return the images at `indices`, float32 [B C H W] in [-1, 1], mirrored if `flip`."""
        images = as_floats(self.images(indices))
        if flip is not None:
            marked = torch.tensor(flip, dtype=torch.bool)
            images[marked] = images[marked].flip(-1)
        return images

    def annotations(self, indices: Sequence[int]) -> tuple[list[str] | None, list[int] | None]:
        """Return the captions and labels of the images at `indices`; None for what is missing."""
        captions = None if self.captions is None else [self.captions[i] for i in indices]
        return captions, None if self.labels is None else [self.labels[i] for i in indices]

    def subset(self, indices: Sequence[int]) -> ImageData:
        """Return the data set of the images at `indices`, in that order."""
        captions, labels = self.annotations(indices)
        positions = tuple(self.positions[i] for i in indices)
        return replace(self, positions=positions, captions=captions, labels=labels)

    def at(self, shape: Shape) -> ImageData:
        """Return the same images in another shape [C H W]."""
        return replace(self, shape=shape, _cache={})

    def sizes(self) -> list[tuple[int, int]] | None:
        """Return (H, W) of each image as it is stored; None if the source does not say it."""
        headers = getattr(self.pixels, "headers", None)
        if headers is None:
            return None
        return [(headers[p].height, headers[p].width) for p in self.positions]

    def _image(self, position: int) -> Pixels8:
        if position in self._cache:
            return self._cache[position]
        image = fit(self.pixels.read(position, self.shape[1:]), self.shape)
        if not self.pixels.resident and (len(self._cache) + 1) * image.nbytes <= CACHE_BYTES:
            self._cache[position] = image
        return image


def as_floats(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def fit(image: Pixels8, shape: Shape) -> Pixels8:
    """Return an image [c h w] in `shape` [C H W]: the centre of that aspect, Lanczos, antialiased.

    Grey is Rec. 601 luma. Colour from grey repeats the channel.
    """
    c, height, width = shape
    if image.shape != shape and image.shape[0] != c:
        image = as_pixels(as_pil(image).convert("RGB" if c == 3 else "L"))
    if image.shape != shape:
        image = as_pixels(ImageOps.fit(as_pil(image), (width, height), Image.Resampling.LANCZOS))
    return image


def as_pixels(image: Image.Image) -> Pixels8:
    """Return a grey or colour image as [C H W]."""
    values = np.asarray(image)
    return np.array(values[None] if values.ndim == 2 else values.transpose(2, 0, 1), order="C")


def as_pil(image: Pixels8) -> Image.Image:
    """Return [C H W] as a grey or colour image."""
    if image.shape[0] == 1:
        return Image.fromarray(image[0])
    return Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
