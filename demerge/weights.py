"""Weights on disk: lazy, checked safetensors in files, component folders, pipeline folders and shards; and their hash.

A `Checkpoint` is a mapping from names to tensors that share memory with the mapped files: nothing is read before an element
is used, so a model larger than memory costs nothing to open. Headers, shard indexes and paths are checked on opening.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from demerge.errors import InputError
from demerge.headers import Spec, read_header, read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COMPONENTS = ("unet", "transformer")
STEMS = ("diffusion_pytorch_model", "model")
BESIDE = frozenset({"fisher.safetensors"})  # tensors that lie beside the weights and are none
TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
HASH_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a denoiser lies.

    Attributes:
        path: as it was named.
        pipeline: the pipeline folder with model_index.json, or None.
        component: the folder with config.json and weights, or None for a single file.
        files: the safetensors files.
        index: which file each tensor lies in, for shards.
    """

    path: Path
    pipeline: Path | None
    component: Path | None
    files: tuple[Path, ...]
    index: Mapping[str, str] | None = None

    def beside(self, name: str) -> Path | None:
        """Return the file `name` in the pipeline folder, the component's or the one around it, where there is one."""
        folders = (self.pipeline, self.component, self.component.parent if self.component else self.path.parent)
        return next((f / name for f in folders if f is not None and (f / name).is_file()), None)


def locate(path: Path) -> Place:
    """Find the denoiser's weights: a .safetensors file, a component folder or a pipeline folder, sharded or not.

    Raises:
        InputError: where there is none, only pickles, or a path that leads out of the folder.
    """
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _sharded(path, None, path.parent, path)
        return Place(path, None, None, (path,))
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder", fix="name a pipeline folder, a component folder or a .safetensors file")
    if not (path / "model_index.json").is_file():
        return _component(path, None, path)
    index = read_json(path / "model_index.json")
    name = next((c for c in COMPONENTS if c in index and (path / c).is_dir()), None)
    if name is None:
        raise InputError(f"{path}: no folder {' or '.join(COMPONENTS)}", fix="use a pipeline with a UNet or a transformer")
    return _component(path, path, path / name)


def _component(path: Path, pipeline: Path | None, folder: Path) -> Place:
    present = [p for p in sorted(folder.glob("*.safetensors*")) if p.name not in BESIDE]
    for stem in STEMS:
        for candidate in present:
            rest = candidate.name.removeprefix(stem)
            if rest == ".safetensors":
                return Place(path, pipeline, folder, (inside(folder, candidate),))
            if rest == ".safetensors.index.json":
                return _sharded(path, pipeline, folder, candidate)
    indexes = [p for p in present if p.name.endswith(".index.json")]
    files = [p for p in present if p.suffix == ".safetensors"]
    if len(indexes) == 1:
        return _sharded(path, pipeline, folder, indexes[0])
    if len(files) == 1:
        return Place(path, pipeline, folder, (inside(folder, files[0]),))
    if files:
        names = ", ".join(p.name for p in files[:5])
        raise InputError(f"{folder}: several weight files and none is the main one: {names}", fix="name one of the files")
    if any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
        raise InputError(f"{folder}: only pickled weights, which may run code when opened", fix="convert them to safetensors")
    raise InputError(f"{folder}: no .safetensors weights", fix="name the folder that holds diffusion_pytorch_model.safetensors")


def _sharded(path: Path, pipeline: Path | None, folder: Path, index: Path) -> Place:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: weight_map is not a table of file names", fix="fetch the index again")
    names = dict.fromkeys(weight_map.values())
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
            raise InputError(f"{index}: weight_map leads out of its folder: {name[:200]!r}", fix="do not use this checkpoint")
    return Place(path, pipeline, folder, tuple(inside(folder, folder / name) for name in names), weight_map)


def inside(root: Path, path: Path) -> Path:
    """Return `path` once its real place is known to lie inside `root`, or in the Hub cache that `root` belongs to.

    Raises:
        InputError: where a link leads elsewhere.
    """
    home, real = root.resolve(), path.resolve()
    cache = next((p for p in home.parents if p.name.startswith("models--") and (p / "snapshots").is_dir()), home)
    if not real.is_relative_to(cache):
        raise InputError(f"{path} leads out of {root}, to {real}", fix="put the file itself into the folder")
    return path


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
                    raise InputError(f"{file}: tensor {name!r} is in {self.specs[name].file.name} too", fix="fetch the shards again")
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
        return cls(locate(Path(path)))

    def _refuse_other_index(self, index: Mapping[str, str]) -> None:
        missing = [n for n, file in index.items() if n not in self.specs or self.specs[n].file.name != PurePosixPath(file).name]
        extra = [n for n in self.specs if n not in index]
        for what, names in (("are not in the shard the index names", missing), ("are in no index", extra)):
            if names:
                raise InputError(
                    f"{self.place.path}: {len(names)} tensors {what}: {', '.join(names[:5])}", fix="fetch index and shards again"
                )

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
        data = torch.frombuffer(self._maps[spec.file], dtype=torch.uint8, count=spec.stop - spec.start, offset=spec.start)
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
    for chunk in _chunks(tensor.detach().reshape(-1)):
        digest.update((chunk.float() if chunk.is_floating_point() else chunk).cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _chunks(flat: Tensor) -> Iterable[Tensor]:
    return flat.split(HASH_CHUNK) if flat.numel() else ()
