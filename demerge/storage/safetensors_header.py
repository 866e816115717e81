"""The header of a safetensors file, read without torch and without trust.

    8 bytes n, little-endian | n bytes JSON | data
    JSON: {"name": {"dtype", "shape", "data_offsets": [start, stop]}, ...}

What is refused: files that are something else (an LFS pointer, a web page, a pickle), truncated or
padded files, headers over 16 MB or of more than 65,536 tensors, duplicate names, offsets that
overlap, leave holes or disagree with dtype and shape.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demerge.errors import InputError

MAX_HEADER = 16 << 20
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 32
MAX_DEPTH = 32
STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"')
BRACKETS = re.compile(rb"[][{}]")
ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
CONVERT = "demerge convert FILE OUT.safetensors --allow-pickle"
# dtypes of quantised layers alone
CODES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
DISGUISES: Mapping[bytes, str] = {
    b"version https://git-lfs": "a Git LFS pointer, not weights; run `git lfs pull`",
    b"<!doctype": "a web page, not weights; fetch the file again",
    b"<html": "a web page, not weights; fetch the file again",
    b"PK\x03\x04": f"a zip archive, most likely a PyTorch pickle; {CONVERT}",
    b"\x80": f"a pickle, which may run code when opened; {CONVERT}",
    b"GGUF": "a GGUF file; name the safetensors original",
}


@dataclass(frozen=True, slots=True)
class Spec:
    """Where a tensor lies: safetensors dtype, shape, and the bytes [start, stop) of the file.

    Attributes:
        scale: what its codes are multiplied with, for a weight in scaled fp8.
        parts: what it is joined of by rows, if it is in no file as a whole.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    scale: Scale | None = None
    parts: tuple[Spec, ...] = ()

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating point numbers."""
        return self.dtype in FLOATS

    def rows(self, start: int, stop: int) -> Spec:
        """Return some of its rows [m *] as a tensor.

        Raises:
            ValueError: if it does not have them.
        """
        m, scale = next(iter(self.shape), 0), self.scale
        if stop > m:
            raise ValueError(f"a tensor of shape {list(self.shape)} has no row {stop - 1}")
        size = (self.stop - self.start) // max(1, m)
        if scale is not None and scale.spec.numel == m > 1:
            scale = replace(scale, spec=scale.spec.rows(start, stop))
        shape, begin = (stop - start, *self.shape[1:]), self.start + start * size
        end = self.start + stop * size
        return replace(self, shape=shape, start=begin, stop=end, scale=scale)

    @classmethod
    def join(cls, parts: Sequence[Spec]) -> Spec:
        """Return tensors [m_i *] as one, by rows."""
        first, size = parts[0], sum(part.stop - part.start for part in parts)
        shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
        return cls(first.file, first.dtype, shape, 0, size, parts=tuple(parts))


@dataclass(frozen=True, slots=True)
class Scale:
    """What lies next to a weight in scaled fp8, by the last part of its key.

    Attributes:
        name: of its scale, whose place is `spec`.
        beside: what else belongs to the layer, for example scale_input.
    """

    name: str
    spec: Spec
    beside: Mapping[str, Spec]


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of one file, in the order of their bytes, and its metadata."""

    tensors: Mapping[str, Spec]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    text, data_start, size = _header_bytes(path)
    document = _parse(path, text)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "__metadata__ is not a table of strings")
    if len(document) > MAX_TENSORS:
        raise _damaged(path, f"{len(document):,} tensors, more than {MAX_TENSORS:,}")
    specs = {name: _spec(path, name, entry, data_start) for name, entry in document.items()}
    ordered = dict(sorted(specs.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_no_gaps(path, ordered, data_start, size)
    return Header(ordered, metadata)


def header_bytes(table: Mapping[str, Any]) -> bytes:
    """Return what precedes the data of a file: the length of the table, the table, and spaces.

    The keys of `__metadata__`, if there is any, are sorted: equal tables give equal bytes.
    """
    if "__metadata__" in table:
        table = {**table, "__metadata__": dict(sorted(table["__metadata__"].items()))}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def format_of(path: Path) -> Any:
    """Return the `format` of a JSON document; None if it has none or is damaged."""
    try:
        return read_json(path).get("format")
    except InputError:
        return None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 16 MB, duplicate keys refused.

    Raises:
        InputError: if the file is missing, too large or not a JSON object.
    """
    return _parse(path, read_bytes(path, MAX_HEADER))


def read_scheduler(path: Path) -> dict[str, Any]:
    """Read a scheduler_config.json, in which diffusers may write -Infinity.

    Raises:
        InputError: as `read_json` does.
    """
    return _parse(path, read_bytes(path, MAX_HEADER), infinite=True)


def read_bytes(path: Path, most: int) -> bytes:
    """Read a file of at most `most` bytes; a pipe or a device, which may have no end, is refused.

    Raises:
        InputError: if the file is missing, something else, or larger.
    """
    try:
        if not path.is_file() and path.exists():
            raise InputError(f"{path} is not a regular file", fix="name a file")
        with path.open("rb") as stream:
            text = stream.read(most + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(text) > most:
        raise _damaged(path, f"larger than {most >> 20} MB")
    return text


def _header_bytes(path: Path) -> tuple[bytes, int, int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            beginning = stream.read(64)
            _check_real_name(path, beginning)
            if len(beginning) < 8:
                raise _damaged(path, f"truncated: {size} bytes")
            length: int = struct.unpack("<Q", beginning[:8])[0]
            if length > MAX_HEADER:
                what = f"the header claims {length:,} bytes, more than {MAX_HEADER:,}"
                raise _damaged(path, what)
            if 8 + length > size:
                what = f"truncated: {size:,} bytes, the header alone needs {8 + length:,}"
                raise _damaged(path, what)
            stream.seek(8)
            return stream.read(length), 8 + length, size
    except OSError as error:
        raise _unreadable(path, error) from error


def _check_real_name(path: Path, beginning: bytes) -> None:
    for magic, what in DISGUISES.items():
        if beginning.lstrip().lower().startswith(magic.lower()) and beginning[8:9] != b"{":
            kind, _, fix = what.partition("; ")
            raise InputError(f"{path}: {kind}", fix=fix)


def parse_json(text: bytes | str, *, infinite: bool = False) -> dict[str, Any]:
    """Return the JSON object that a text holds, read more strictly than Python does.

    Args:
        infinite: take Infinity and -Infinity, which are not JSON.

    Raises:
        ValueError: if it is not an object, a key occurs twice, it is more than 32 levels deep, or
            holds NaN, a number beyond 64 bits, or text that no file name can hold (NUL, half of a
            surrogate pair).
    """
    text = text.encode() if isinstance(text, str) else text
    try:
        document = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_infinite if infinite else _finite,
            parse_float=_finite,
            parse_int=_whole,
        )
        has_escapes = b"\\u" in text
        if has_escapes and "\\u0000" in json.dumps(document, ensure_ascii=False).encode().decode():
            raise ValueError("a text holds NUL")
    except UnicodeEncodeError as error:
        raise ValueError("a text holds half of a surrogate pair") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({str(error)[:80]})") from error
    if not isinstance(document, dict):
        raise ValueError("a JSON object was expected")
    if _depth(text) > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels deep")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return float(text)


def _infinite(text: str) -> float:
    return float(text) if text.endswith("Infinity") else _finite(text)


def _whole(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 1 << 63:
        raise ValueError(f"the number {text[:20]}... is beyond 64 bits")
    return int(text)


def _depth(text: bytes) -> int:
    """Return how deep the brackets of JSON text are nested."""
    depth = deepest = 0
    for bracket in BRACKETS.findall(STRINGS.sub(b"", text)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _parse(path: Path, text: bytes, *, infinite: bool = False) -> dict[str, Any]:
    try:
        return parse_json(text, infinite=infinite)
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _spec(path: Path, name: str, entry: Any, data_start: int) -> Spec:
    tensor = f"tensor {name[:200]!r}"
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or not isinstance(dtype, str):
        raise _damaged(path, f"{tensor} lacks a dtype, a shape or offsets")
    if dtype in CODES:
        what = f"{path}: {tensor} is quantised ({dtype}), codes are not numbers"
        fix = "name the float32, float16, bfloat16 or scaled fp8 file of this model"
        raise InputError(what, fix=fix)
    if dtype not in ITEM_BYTES:
        raise _damaged(path, f"{tensor} has the unknown dtype {dtype[:20]!r}")
    if len(shape) > MAX_DIMENSIONS or math.prod(max(1, n) for n in shape) >= 1 << 62:
        raise _damaged(path, f"{tensor} has an impossible shape")
    if stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        what = f"{tensor} {dtype} {list(shape)} does not fit its {stop - start:,} bytes"
        raise _damaged(path, what)
    return Spec(path, dtype, shape, data_start + start, data_start + stop)


def _check_no_gaps(path: Path, specs: Mapping[str, Spec], data_start: int, size: int) -> None:
    position = data_start
    for name, spec in specs.items():
        if spec.start != position:
            how = "overlaps the one" if spec.start < position else "leaves a hole"
            raise _damaged(path, f"tensor {name[:200]!r} {how} before it")
        position = spec.stop
    if position > size:
        raise _damaged(path, f"truncated: {size:,} bytes of {position:,}")
    if position < size:
        raise _damaged(path, f"{size - position:,} bytes behind the last tensor belong to nothing")


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read: {error.strerror}", fix="check the path")


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}", fix="fetch or make the file again")
