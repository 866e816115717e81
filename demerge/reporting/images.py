"""Images as bytes: from [-1, 1] to uint8, to PNG, to a contact sheet."""

from __future__ import annotations

from io import BytesIO

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Map images from [-1, 1] to uint8 0..255, rounding to the nearest."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def png(image: Tensor, *, scale: int = 1) -> bytes:
    """Encode an image, uint8 [C H W] with C = 1 or 3, as PNG, each pixel as scale x scale."""
    array = rearrange(image.cpu(), "c h w -> h w c").numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    stream = BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(
        stream, "PNG"
    )
    return stream.getvalue()


def grid(images: Tensor, columns: int, *, gap: int = 1, background: int = 255) -> Tensor:
    """Lay images, uint8 [B C H W], out row by row as one image [C H' W'], the last row filled up with background."""
    images = torch.nn.functional.pad(images, (gap, gap, gap, gap), value=background)
    missing = -len(images) % columns
    filler = images.new_full((missing, *images.shape[1:]), background)
    return rearrange(
        torch.cat([images, filler]),
        "(rows columns) c h w -> c (rows h) (columns w)",
        columns=columns,
    )
