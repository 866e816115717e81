"""Images as bytes: from [-1, 1] to uint8, to PNG, to a contact sheet."""

from __future__ import annotations

from io import BytesIO

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from demerge.errors import UsageError


def to_uint8(images: Tensor) -> Tensor:
    """Map images from [-1, 1] to uint8 0..255, rounding to the nearest."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def check_uint8(images: Tensor, channels: tuple[int, ...] = (1, 3)) -> None:
    """Check that images are uint8 [B C H W], with one of the numbers C of channels if any."""
    has_channels = images.ndim == 4 and (not channels or images.shape[1] in channels)
    if images.dtype != torch.uint8 or not has_channels:
        expected = f"uint8 [B {'|'.join(map(str, channels)) or 'C'} H W]"
        what = f"images are {images.dtype} {list(images.shape)}, expected {expected}"
        raise UsageError(what, fix="convert them: demerge.reporting.images.to_uint8")


def png(image: Tensor, *, scale: int = 1) -> bytes:
    """Encode an image, uint8 [C H W] with C = 1 or 3, as PNG, each pixel as scale x scale."""
    array = rearrange(image.cpu(), "c h w -> h w c").numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    size, stream = (picture.width * scale, picture.height * scale), BytesIO()
    picture.resize(size, Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()


def grid(images: Tensor, columns: int, *, gap: int = 1, background: int = 255) -> Tensor:
    """Lay out images, uint8 [B C H W], as rows of one image [C H' W'], the last one filled up."""
    images = torch.nn.functional.pad(images, (gap, gap, gap, gap), value=background)
    missing = -len(images) % columns
    filler = images.new_full((missing, *images.shape[1:]), background)
    images, pattern = torch.cat([images, filler]), "(rows columns) c h w -> c (rows h) (columns w)"
    return rearrange(images, pattern, columns=columns)
