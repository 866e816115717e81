"""Folders of images: found recursively, checked from their heads and tails, decoded when asked for.

Decoding turns the image by its EXIF orientation, lays transparency on white, scales 16-bit grey to 8 bits, and gives
grey [1 H W] or colour [3 H W]. A file is refused from its header where it has more than 64 million pixels.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from demerge.data.arrays import Source
from demerge.data.captions import read_captions
from demerge.data.values import Pixels8, Shape, as_pixels
from demerge.errors import InputError

KINDS = ("avif", "bmp", "gif", "jfif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
MAX_PIXELS = 64_000_000
EDGE_BYTES = 4096
GREY = frozenset({"1", "L", "I", "I;16", "I;16B", "I;16L"})
DEEP = frozenset({"I", "I;16", "I;16B", "I;16L"})
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class Header:
    """What the head of an image file says; width and height are those after turning."""

    width: int
    height: int
    mode: str
    alpha: bool
    turned: bool

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return 1 if self.mode in GREY or self.mode == "LA" else 3


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

    def read(self, index: int) -> Pixels8:
        """Return image `index`, [C H W].

        Raises:
            InputError: where the file is damaged.
        """
        return decode(self.paths[index])


def read_folder(folder: Path, *, skip_broken: bool = False) -> Source:
    """Read a folder of images, recursively, sorted by name; `train/` and `test/` in it are its splits.

    Broken files are found from heads and tails; with `skip_broken` every file is decoded, and what fails is left out.

    Raises:
        InputError: where there is no image, or files are broken; it lists the first ten.
    """
    paths = find_images(folder)
    headers, broken = {}, {}
    for path in paths:
        try:
            headers[path] = check(path)
            if skip_broken:
                decode(path)
        except InputError as error:
            broken[path] = error
    if broken and (not skip_broken or len(broken) == len(paths)):
        raise _broken(folder, len(paths), list(broken.values()))
    good = [path for path in paths if path not in broken]
    captions = read_captions(folder, good)
    pixels = Files(tuple(good), tuple(headers[path] for path in good))
    content, labels = _content(folder, good, captions), class_labels(folder, good, paths)
    return Source(folder.resolve().name, pixels, content, own_test(folder, good), captions, labels)


def find_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, hidden ones left out, sorted by relative name.

    Raises:
        InputError: where there is none.
    """
    found = []
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [Path(place, n) for n in names if not n.startswith(".") and Path(n).suffix.lower().removeprefix(".") in KINDS]
    if not found:
        raise InputError(f"{folder}: no image in this folder", fix=f"give a folder of {', '.join(KINDS)} files")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def check(path: Path) -> Header:
    """Check an image file without decoding it, unless its tail looks cut off.

    Raises:
        InputError: where it is empty, no image, too large or truncated.
    """
    with _opened(path) as image:
        transposed = image.getexif().get(EXIF_ORIENTATION, 1) in range(5, 9)
        turned = image.getexif().get(EXIF_ORIENTATION, 1) in range(2, 9)
        width, height = image.size[::-1] if transposed else image.size
        header = Header(width, height, image.mode, image.has_transparency_data, turned)
        kind = image.format
    if not _whole(path, kind):
        decode(path)
    return header


def decode(path: Path) -> Pixels8:
    """Decode an image file to [C H W]: turned by EXIF, transparency on white, 16 bits scaled to 8.

    Raises:
        InputError: where it is empty, no image, too large or truncated.
    """
    with _opened(path) as image:
        image.load()
        return decoded(image, str(path))


def decoded(image: Image.Image, name: str) -> Pixels8:
    """Return an opened image as [C H W]: turned by EXIF, transparency on white, 16 bits scaled to 8.

    Raises:
        InputError: where its pixels are floats.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise InputError(f"{name}: pixels are floats of unknown range", fix="save it with 8 or 16 bits per channel")
    if image.mode in DEEP:
        return _eight_bits(image)[None]
    if image.has_transparency_data:
        grey = image.mode == "LA"
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("L" if grey else "RGB")
    return as_pixels(image.convert("L" if image.mode in GREY else "RGB"))


def _eight_bits(image: Image.Image) -> Pixels8:
    values = np.asarray(image).astype(np.float64)
    return np.rint(np.clip(values, 0, 65535) / 257).astype(np.uint8)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file; every way in which it can be wrong becomes an InputError that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: more than {MAX_PIXELS // 10**6} million pixels", fix="scale it down or remove it") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: {_what_else(path)}", fix="replace or remove it") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        cut = "truncat" in reason or "incomplete" in reason.lower()
        raise InputError(
            f"{path}: {'truncated' if cut else 'damaged'} image ({reason.replace(str(path), path.name)})",
            fix="copy it again or remove it",
        ) from error


def _what_else(path: Path) -> str:
    head = path.read_bytes()[:256] if path.stat().st_size < EDGE_BYTES else _edges(path)[:256]
    if not head:
        return "empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the image (git lfs pull fetches it)"
    if head.lstrip()[:1] == b"<" and b"svg" not in head.lower():
        return "a web page, not an image"
    return "no image in a format that can be read"


def _edges(path: Path) -> bytes:
    with path.open("rb") as stream:
        head = stream.read(EDGE_BYTES)
        stream.seek(max(0, path.stat().st_size - EDGE_BYTES))
        return head + stream.read(EDGE_BYTES)


def _whole(path: Path, kind: str | None) -> bool:
    """Say whether the tail of a file is that of a whole image; False where only decoding can tell."""
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


def _content(folder: Path, paths: Sequence[Path], captions: list[str] | None) -> str:
    """Hash names, sizes and the first and last 4 KiB of each file, and the captions."""
    digest = hashlib.sha256()
    for path in paths:
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        digest.update(_edges(path))
    digest.update(repr(captions).encode())
    return digest.hexdigest()


def own_test(folder: Path, paths: Sequence[Path]) -> tuple[int, ...] | None:
    """Return the positions under `test/`, where every image lies under `train/` or `test/`."""
    tops = [path.relative_to(folder).parts[0] for path in paths]
    return tuple(i for i, top in enumerate(tops) if top == "test") if set(tops) == {"train", "test"} else None


def class_labels(folder: Path, images: Sequence[Path], every: Sequence[Path] | None = None) -> list[int] | None:
    """Return the class of each image: its folder's place among all, in alphabetical order, or the folder's name as a number.

    The folder is the first below the source, or below its `train/` and `test/`. Numbers count where every folder's name is one.
    None where an image lies in no such folder, or there is but one.

    Args:
        every: images of all classes, where `images` are some of them.
    """
    below = 1 if own_test(folder, every or images) is not None else 0
    parts = {path: path.relative_to(folder).parts for path in every or images}
    names = sorted({part[below] for part in parts.values() if len(part) > below + 1})
    if len(names) < 2 or any(len(part) <= below + 1 for part in parts.values()):
        return None
    numbers = all(name.isascii() and name.isdigit() for name in names)
    of = {name: int(name) if numbers else i for i, name in enumerate(names)}
    return [of[parts[path][below]] for path in images]


def _broken(folder: Path, total: int, errors: Sequence[InputError]) -> InputError:
    lines = [f"  {error.what}" for error in errors[:10]]
    if len(errors) > 10:
        lines.append(f"  and {len(errors) - 10} more")
    what = f"{folder}: {len(errors)} of {total} images cannot be read:\n" + "\n".join(lines)
    fix = f"'demerge data check {folder}' lists them; mend or remove them"
    return InputError(what, fix=fix if len(errors) == total else f"{fix}, or leave them out with --skip-broken")
