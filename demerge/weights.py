"""Weights on disk: lazy, checked safetensors, and the hash of their content.

A `Checkpoint` is a mapping from names to tensors that share memory with the mapped files: nothing is read before an
element is used, so a model larger than memory costs nothing to open. Headers, shard indexes and paths are checked on
opening.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from demerge.errors import InputError
from demerge.files import commit_file
from demerge.headers import Spec, read_header, read_json
from demerge.local import local
from demerge.places import Place, locate

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
HASH_CHUNK = 1 << 20


class Checkpoint(Mapping[str, "Tensor"]):
    """The tensors of a denoiser on disk, in the order of the files, mapped and not read.

    A tensor shares the private mapping of its file; treat it as read-only.

    Attributes:
        place: where it lies.
        specs: dtype, shape and bytes of each tensor.
    """

    def __init__(self, place: Place) -> None:
        headers = {file: read_header(file) for file in place.files}
        self.place = place
        self.specs: dict[str, Spec] = {}
        self.metadata: dict[str, str] = {}
        for file, header in headers.items():
            for name in header.tensors:
                if name in self.specs:
                    other = self.specs[name].file.name
                    raise InputError(f"{file}: tensor {name!r} is in {other} too", fix="fetch the shards again")
            self.specs |= header.tensors
            self.metadata |= header.metadata
        if place.index is not None:
            self._refuse_other_index(place.index)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Locate and open a file or folder.

        Raises:
            InputError: where it is missing, damaged or hostile.
        """
        return cls(locate(local(path)))

    def _refuse_other_index(self, index: Mapping[str, str]) -> None:
        held = {name: spec.file.name for name, spec in self.specs.items()}
        missing = [name for name, file in index.items() if held.get(name) != PurePosixPath(file).name]
        extra = [name for name in held if name not in index]
        for what, names in (("are not in the shard the index names", missing), ("are in no index", extra)):
            if names:
                listed = f"{len(names)} tensors {what}: {', '.join(names[:5])}"
                raise InputError(f"{self.place.path}: {listed}", fix="fetch index and shards again")

    @cached_property
    def _maps(self) -> dict[Path, mmap.mmap]:
        maps = {}
        for file in self.place.files:
            with file.open("rb") as stream:
                maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return maps

    def __getitem__(self, name: str) -> Tensor:
        import torch

        spec = self.specs[name]
        dtype: torch.dtype = getattr(torch, TORCH_NAMES[spec.dtype])
        if spec.numel == 0:
            return torch.empty(spec.shape, dtype=dtype)
        length = spec.stop - spec.start
        data = torch.frombuffer(self._maps[spec.file], dtype=torch.uint8, count=length, offset=spec.start)
        return (data if spec.start % dtype.itemsize == 0 else data.clone()).view(dtype).view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    @property
    def config(self) -> dict[str, Any] | None:
        """The component's config.json, where there is one."""
        folder = self.place.component
        return read_json(folder / "config.json") if folder is not None and (folder / "config.json").is_file() else None

    @property
    def parameters(self) -> int:
        """The number of floating point elements."""
        return sum(spec.numel for spec in self.specs.values() if spec.is_float)

    @property
    def dtypes(self) -> list[str]:
        """The dtypes of the floating point tensors, by torch's names, most elements first."""
        counts: dict[str, int] = {}
        for spec in self.specs.values():
            if spec.is_float:
                counts[TORCH_NAMES[spec.dtype]] = counts.get(TORCH_NAMES[spec.dtype], 0) + spec.numel
        return sorted(counts, key=lambda name: -counts[name])


def content_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of what a model computes with: names, shapes and values, whatever the file, order or dtype.

    The hash of the lines `name kind shape sha256(values)`, sorted by name. Floating point values count as their float32
    values, so that a float16 file and the model loaded from it in float32 have one hash.
    """
    lines = sorted(f"{name}\t{_kind(t)}\t{list(t.shape)}\t{_values_sha256(t)}\n" for name, t in tensors.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _kind(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")


def _values_sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), HASH_CHUNK):
        chunk = flat[start : start + HASH_CHUNK]
        digest.update((chunk.float() if chunk.is_floating_point() else chunk).cpu().contiguous().numpy().data)
    return digest.hexdigest()


def commit_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write tensors as one safetensors file, atomically."""
    from safetensors.torch import save

    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return commit_file(path, lambda stream: stream.write(save(held, dict(metadata or {}))))
