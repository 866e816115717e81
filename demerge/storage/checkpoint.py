"""Weights on disk: lazy, checked safetensors, and the hash of their content.

A `Checkpoint` is a mapping from names to tensors that share memory with the mapped files: nothing
is read before an element is used, so a model larger than memory costs nothing to open. Headers,
shard indexes and paths are checked on opening.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from pydantic import Field

from demerge.errors import InputError
from demerge.storage.atomic import commit_file
from demerge.storage.hub import resolve_model_path
from demerge.storage.layout import CheckpointLocation, locate
from demerge.storage.names import NO_FAMILY, Family, find_family
from demerge.storage.names.tensors import rename_rows
from demerge.storage.quantised import numbers
from demerge.storage.safetensors_header import Spec, header_bytes, read_header, read_json
from demerge.storage.schema import Foreign, checked

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
Value = TypeVar("Value")
OLD_ATTENTION = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=(\.(weight|bias))?\Z)")
NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
WRAPPERS = "_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module"
WRAPPER = re.compile(rf"(?:^|(?<=\.))(?:{WRAPPERS})\.")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "text_model.")


def modern(name: str) -> str:
    """Return today's name in diffusers of a tensor or module with attention names of 2022."""
    return OLD_ATTENTION.sub(lambda match: NEW_ATTENTION[match[1]], name)


def canonical(name: str) -> str:
    """Return a name as diffusers has it.

    Without wrappers (torch.compile, DDP), prefixes of single files and old attention names.
    """
    plain = WRAPPER.sub("", name)
    prefix = next((prefix for prefix in PREFIXES if plain.startswith(prefix)), "")
    return modern(plain.removeprefix(prefix))


def denoiser_of(names: Mapping[str, Value]) -> Mapping[str, Value]:
    """Return the tensors of the denoiser: those with its prefix, if a file has it, else all."""
    inside = {name: names[name] for name in names if name.startswith(PREFIXES[:2])}
    return inside or names


def has_original(family: Family, names: Mapping[str, Any]) -> bool:
    """Whether a denoiser has the names of the original code."""
    modules = (canonical(name).removesuffix(".weight") for name in denoiser_of(names))
    return any(family.is_original(module) for module in modules)


class Named(Foreign):
    """A config that says which class it is of."""

    class_name: str | None = Field(None, alias="_class_name")


class Checkpoint(Mapping[str, "Tensor"]):
    """The tensors of a denoiser on disk, in the order of the files, mapped and not read.

    A tensor shares the private mapping of its file; treat it as read-only. Weights in scaled fp8
    are read as the numbers that they stand for, in float32; their scales are not tensors of the
    model (`storage` has them).

    Attributes:
        place: where it lies.
        specs: dtype, shape and bytes of each tensor, as the file stores them.

    Raises:
        InputError: if a file is damaged or hostile, or holds codes that are not scaled fp8.
    """

    def __init__(self, place: CheckpointLocation) -> None:
        headers = {file: read_header(file) for file in place.files}
        self.place = place
        self.specs: dict[str, Spec] = {}
        self.metadata: dict[str, str] = {}
        self._views: dict[str, Tensor] = {}
        for file, header in headers.items():
            for name in (name for name in header.tensors if name in self.specs):
                what = f"{file}: tensor {name!r} is in {self.specs[name].file.name} too"
                raise InputError(what, fix="fetch the shards again")
            self.specs |= header.tensors
            self.metadata |= header.metadata
        if place.index is not None:
            self._check_index(place.index)
        self.specs, self._markers = numbers(self.specs, self.metadata, self._bytes)

    def __repr__(self) -> str:
        dtypes = ", ".join(self.dtypes) or "no floating point tensor"
        sizes = f"{len(self)} tensors, {self.parameters:,} parameters"
        return f"Checkpoint({str(self.place.path)!r}, {sizes}, {dtypes})"

    @classmethod
    def open(cls, path: str | Path, variant: str | None = None) -> Checkpoint:
        """Locate and open a file or folder; `variant` chooses among the weights of a folder.

        Raises:
            InputError: if it is missing, damaged or hostile.
        """
        return cls(locate(resolve_model_path(path, variant), variant))

    def named_like(self, base: Mapping[str, Any]) -> Checkpoint:
        """Return this checkpoint under the names of `base`; see `canonical`.

        If one has the names of the original code and the other those of diffusers, matrices are
        split or joined by rows. Names that mean nothing in the base, or two things, stay.
        """
        own = self.specs
        family = find_family(map(canonical, base))
        is_original = has_original(family, base)
        if family is not NO_FAMILY and is_original != has_original(family, own):
            own = self._in_other_layout(family, to_original=is_original)
        names: dict[str, str | None] = {}
        for name in base:
            names[canonical(name)] = None if canonical(name) in names else name
        renamed = {
            name if name in base else names.get(canonical(name)) or name: spec
            for name, spec in own.items()
        }
        same = len(renamed) != len(own) or list(renamed) == list(self.specs)
        return self if same else self._with(renamed)

    def _in_other_layout(self, family: Family, *, to_original: bool) -> dict[str, Spec]:
        """Return the tensors in the layout of the original code, or in that of diffusers."""
        inside = {canonical(name): spec for name, spec in denoiser_of(self.specs).items()}
        shapes = {name: spec.shape for name, spec in inside.items()}
        made = {}
        try:
            rows = rename_rows(shapes, family, to_original=to_original)
            for name, sources in rows.items():
                parts = [inside[n].rows(*span) if span else inside[n] for n, span in sources]
                made[name] = parts[0] if len(parts) == 1 else Spec.join(parts)
        except ValueError as error:
            what = f"{self.place.path} does not have the tensors of a {family.name} model: {error}"
            raise InputError(what, fix="name a model of the base's kind") from error
        outside = self.specs.keys() - denoiser_of(self.specs).keys()
        return {name: self.specs[name] for name in self.specs if name in outside} | made

    def only(self, names: Iterable[str]) -> Checkpoint:
        """Return this checkpoint with some of its tensors."""
        return self._with({name: self.specs[name] for name in names})

    def _with(self, specs: dict[str, Spec]) -> Checkpoint:
        other = copy.copy(self)
        other.specs, other._views = specs, {}
        return other

    def _check_index(self, index: Mapping[str, str]) -> None:
        held = {name: spec.file.name for name, spec in self.specs.items()}
        files = {name: PurePosixPath(file).name for name, file in index.items()}
        missing = [name for name in files if held.get(name) != files[name]]
        names = missing or [name for name in held if name not in index]
        if names:
            rule = "are not in the shard the index names" if missing else "are in no index"
            what = f"{self.place.path}: {len(names)} tensors {rule}: {', '.join(names[:5])}"
            raise InputError(what, fix="fetch index and shards again")

    @cached_property
    def _maps(self) -> dict[Path, mmap.mmap]:
        maps = {}
        for file in self.place.files:
            with file.open("rb") as stream:
                maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return maps

    def __getitem__(self, name: str) -> Tensor:
        if name in self._views:
            return self._views[name]
        spec = self.specs[name]
        tensor = self._read(spec)
        is_view = spec.scale is not None or spec.parts or spec.start % tensor.itemsize == 0
        return self._views.setdefault(name, tensor) if is_view else tensor

    def _read(self, spec: Spec) -> Tensor:
        """Return the numbers of a tensor."""
        if spec.parts:
            from demerge.storage.lazy import joined

            return joined([self._read(part) for part in spec.parts])
        tensor = self._stored(spec)
        if spec.scale is None:
            return tensor
        from demerge.storage.scaled import Scaled

        return Scaled.of(tensor, self._stored(spec.scale.spec))

    def _stored(self, spec: Spec) -> Tensor:
        """Return a tensor as the file stores it; one that is not aligned is copied."""
        import torch

        dtype: torch.dtype = getattr(torch, TORCH_NAMES[spec.dtype])
        if spec.numel == 0:
            return torch.empty(spec.shape, dtype=dtype)
        buffer, size = self._maps[spec.file], spec.stop - spec.start
        data = torch.frombuffer(buffer, dtype=torch.uint8, count=size, offset=spec.start)
        return (data.clone() if spec.start % dtype.itemsize else data).view(dtype).view(spec.shape)

    def stored(self) -> dict[str, Tensor]:
        """Return all tensors as the files store them: also codes, their scales and markers."""
        return {name: self._stored(spec) for name, spec in self.specs.items()} | self.storage()

    def _bytes(self, spec: Spec) -> bytes:
        return self._maps[spec.file][spec.start : spec.stop]

    def storage(self, scales: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return what the files hold of scaled fp8 besides codes: scales, also of inputs, markers.

        Args:
            scales: by weight, scales to take the place of the file's, in any shape.
        """
        tensors = {name: self._stored(spec) for name, spec in self._markers.items()}
        for weight, spec in self.specs.items():
            if spec.scale is None:
                continue
            stem = weight.removesuffix("weight")
            for last, other in spec.scale.beside.items():
                tensors[stem + last] = self._stored(other)
            scale = self._stored(spec.scale.spec)
            new = (scales or {}).get(weight, scale)
            tensors[stem + spec.scale.name] = new.to(scale.dtype).view(scale.shape)
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    @property
    def config(self) -> dict[str, Any] | None:
        """The component's config.json, None if there is none."""
        folder = self.place.component
        if folder is None or not (folder / "config.json").is_file():
            return None
        config = read_json(folder / "config.json")
        checked(config, Named, f"{folder}/config.json", fix="use the config of this very model")
        return config

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
                name = TORCH_NAMES[spec.dtype] + (" scaled" if spec.scale else "")
                counts[name] = counts.get(name, 0) + spec.numel
        return sorted(counts, key=lambda name: -counts[name])


def content_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and values, whatever the file, order or dtype.

    It is that of the lines `name kind shape sha256(values)`, sorted by name. Floating point values
    count as their float32 values and names as diffusers has them, so that a file and the model that
    is loaded from it in float32 have the same hash.
    """
    lines = []
    for name, tensor in tensors.items():
        is_float = tensor.is_floating_point()
        kind = "float" if is_float else str(tensor.dtype).removeprefix("torch.")
        digest = _values_sha256(tensor)
        lines.append(f"{modern(name)}\t{kind}\t{list(tensor.shape)}\t{digest}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _values_sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), HASH_CHUNK):
        chunk = flat[start : start + HASH_CHUNK]
        values = chunk.float() if chunk.is_floating_point() else chunk
        digest.update(values.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite: their sum is, or it overflows and each is."""
    if tensor.dtype.itemsize == 1:
        from demerge.storage.scaled import decoded

        tensor = decoded(tensor.reshape(-1)) if tensor.is_floating_point() else tensor.float()
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def commit_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors as one safetensors file, atomically; equal input gives equal bytes."""
    from safetensors.torch import save

    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(held, dict(metadata or {}))
    end = 8 + int.from_bytes(content[:8], "little")
    header = header_bytes(json.loads(content[8:end]))  # the library orders metadata at random

    def write(stream: BinaryIO) -> None:
        stream.write(header)
        stream.write(memoryview(content)[end:])

    return commit_file(path, write)
