"""Image files to pixels: grey [1 H W] or colour [3 H W], 8 bits, sRGB.

Decoding turns an image by its EXIF orientation, converts its colour profile to sRGB, lays
transparency on white and scales 16-bit grey to 8 bits. Pixels of 32 bits are refused, since a file
does not tell their range.

Memory: a file of more than 64 million pixels is refused from its header (24 million in formats
whose decoders hold several copies). One above 16 million is scaled down by a whole factor while it
is decoded, to at least twice the size that is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from demerge.data.values import Least, Pixels8, as_pixels
from demerge.errors import InputError

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 64_000_000
MAX_PIXELS_OF = {"AVIF": 24_000_000, "JPEG2000": 24_000_000, "WEBP": 24_000_000}
BIG = 16_000_000
EDGE_BYTES = 4096
DEEP = frozenset({"I", "I;16", "I;16B", "I;16L"})
GREY = frozenset({"1", "L", "LA", *DEEP})
SIXTEEN = ("PNG", "PPM")  # their mode I holds 0..65535
EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BLOCK = 1 << 20  # pixels that are scaled at a time
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, MemoryError)


@dataclass(frozen=True, slots=True)
class Header:
    """The header of an image file: its size after turning, and what decoding does to it."""

    width: int
    height: int
    mode: str
    notes: tuple[str, ...]

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return 1 if self.mode in GREY else 3


def read_header(path: Path) -> Header:
    """Check an image file; it is decoded only if its tail looks cut off."""
    with _opened(path) as image:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        width, height = image.size[::-1] if orientation in range(5, 9) else image.size
        kind, profile = image.format, _profile_note(image)
        steps = {
            "turned by EXIF": orientation in TURNS,
            "transparency laid on white": image.has_transparency_data,
            "16 bits scaled to 8": image.mode in DEEP,
            "only the first frame taken": kind != "MPO" and getattr(image, "is_animated", False),
            profile: bool(profile),
        }
        notes = tuple(note for note, holds in steps.items() if holds)
        header = Header(width, height, image.mode, notes)
    if not _has_complete_tail(path, kind):
        decode(path, (1, 1))
    return header


def decode(path: Path, least: Least | None = None) -> Pixels8:
    """Decode an image file to [C H W].

    Args:
        least: the height and width that are needed; a big image may be scaled down to twice that.
    """
    with _opened(path) as image:
        factor = _scale_factor(image, least)
        if factor > 1 and image.format in ("JPEG", "MPO"):
            image.draft(image.mode, (image.width // factor, image.height // factor))
        image.load()
        return decode_image(image, str(path), least)


def decode_image(image: Image.Image, name: str, least: Least | None = None) -> Pixels8:
    """Return an opened image as [C H W]; see `decode`."""
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN):
        kind = "floats" if image.mode == "F" else "integers of 32 bits"
        what = f"{name}: pixels are {kind} of unknown range"
        raise InputError(what, fix="save it with 8 or 16 bits per channel")
    target = "L" if image.mode in GREY else "RGB"
    profile = image.info.get("icc_profile")
    turn = TURNS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    if image.mode in DEEP:
        image = _eight_bits(image)
    elif image.mode in ("P", "1", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else target)
    factor = _scale_factor(image, least)
    image = _on_white(image if factor == 1 else image.reduce(factor))
    image = _in_srgb(image if turn is None else image.transpose(turn), profile)
    return as_pixels(image if image.mode == target else image.convert(target))


def _scale_factor(image: Image.Image, least: Least | None) -> int:
    """Return the factor by which an image is scaled down; 1 unless it is big."""
    if least is None or image.width * image.height <= BIG:
        return 1
    return max(1, min(image.size) // (2 * max(least)))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, round(v / 257), by blocks; a transparent value becomes alpha."""
    values, clear = np.asarray(image), image.info.get("transparency")
    scaled = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, BLOCK // max(1, image.width))
    for start in range(0, len(values), rows):
        block = np.clip(values[start : start + rows].astype(np.int64), 0, 65535)
        scaled[start : start + rows] = (block + 128) // 257
    result = Image.fromarray(scaled)
    if isinstance(clear, int):
        alpha = np.where(values == clear, 0, 255).astype(np.uint8)
        result = Image.merge("LA", (result, Image.fromarray(alpha)))
    result.info = _opaque_info(image)
    return result


def _on_white(image: Image.Image) -> Image.Image:
    """Lay transparency on white; grey stays grey."""
    if not image.has_transparency_data:
        return image
    grey = image.mode in GREY
    clear = image.convert("LA" if grey else "RGBA")
    white = Image.new("L" if grey else "RGB", image.size, "white")
    white.paste(clear.convert(white.mode), mask=clear.getchannel("A"))
    white.info = _opaque_info(image)
    return white


def _opaque_info(image: Image.Image) -> dict[Any, Any]:
    return {key: value for key, value in image.info.items() if key != "transparency"}


def _in_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """Convert an image's colours to sRGB by its profile; one that does not fit is ignored."""
    if not profile:
        return image
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    transform = _transform(profile, image.mode)
    return image if transform is None else ImageCms.applyTransform(image, transform) or image


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Any:
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):
        return None


def _profile_note(image: Image.Image) -> str:
    if not (profile := image.info.get("icc_profile")):
        return ""
    mode = "L" if image.mode in GREY else image.mode if image.mode == "CMYK" else "RGB"
    if _transform(profile, mode) is None:
        return "colour profile not readable, taken as sRGB"
    return "colour profile taken to sRGB"


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file; whatever is wrong with it becomes an InputError that names it."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a regular file", fix="remove it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_formats()) as image:
                most = MAX_PIXELS_OF.get(str(image.format), MAX_PIXELS)
                if image.width * image.height > most:
                    raise _too_large(path, most)
                yield image
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path, MAX_PIXELS) from error
    except UnidentifiedImageError as error:
        what = f"{path}: {_kind_of(path)}"
        raise InputError(what, fix="convert, replace or remove it") from error
    except DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        is_cut = "truncat" in reason or "incomplete" in reason.lower()
        what = f"{'truncated' if is_cut else 'damaged'} image"
        reason = reason.replace(str(path), path.name)
        raise InputError(f"{path}: {what} ({reason})", fix="copy it again or remove it") from error


def _too_large(path: Path, most: int) -> InputError:
    what = f"{path}: more than {most // 10**6} million pixels"
    return InputError(what, fix="scale it down or remove it")


def _kind_of(path: Path) -> str:
    head = path.read_bytes()[:256] if path.stat().st_size < EDGE_BYTES else _edges(path)[:256]
    if not head:
        return "empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the image (git lfs pull fetches it)"
    if head.lstrip()[:1] == b"<" and b"svg" not in head.lower():
        return "a web page, not an image"
    suffix = path.suffix.lower().removeprefix(".") or "no suffix"
    return f"not an image in a format that can be read ({suffix}); convert it to PNG"


def _edges(path: Path) -> bytes:
    with path.open("rb") as stream:
        head = stream.read(EDGE_BYTES)
        stream.seek(max(0, path.stat().st_size - EDGE_BYTES))
        return head + stream.read(EDGE_BYTES)


def _has_complete_tail(path: Path, kind: str | None) -> bool:
    """Return whether a file ends as a whole image does; False if only decoding can tell."""
    edges, size = _edges(path), path.stat().st_size
    match kind:
        case "PNG":
            return b"IEND\xaeB`\x82" in edges
        case "JPEG":
            return b"\xff\xd9" in edges[-64:]
        case "WEBP":
            return int.from_bytes(edges[4:8], "little") + 8 <= size
        case "GIF":
            return edges.endswith(b";")
    return False
