"""LoRA files without their base: zeros stand for the weights that they change.

The factors of two LoRA files must not be merged: B_1 A_1 + B_2 A_2 is not (B_1 + B_2) (A_1 + A_2).
Their deltas may, and their rank is at most the sum of the ranks. Modules are the same if their
names are, whatever program wrote them. The merge has the names of the first file; it has kohya's if
some module has no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from demerge.errors import InputError
from demerge.lora.names import Keys
from demerge.lora.products import MissingFactorError, Shape, find_product
from demerge.storage.checkpoint import Checkpoint, modern
from demerge.storage.names import find_family, flat
from demerge.storage.safetensors_header import Spec

PEFT = "base_model.model."
DOTTED = (PEFT, "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
FLAT = ("lora_unet_", "lora_transformer_", "lora_", "lycoris_")
FIX = "name the base that they were trained on: demerge merge BASE LORA LORA --lora-rank R"


@dataclass(slots=True)
class _Module:
    """A module that some file changes; `flat_prefix` is kohya's, if no file has a dotted name."""

    name: str
    shape: Shape
    flat_prefix: str = ""
    rank: int = 0


class NoBase(Mapping[str, Tensor]):
    """Zeros by the names of the weights that some LoRA files change.

    Attributes:
        place: where the first file lies.
        specs: shapes, as a checkpoint has them.
        prefix: of the modules in a file of the merge: unet, or lora_unet_ for kohya's names.
        rank: the rank that holds every sum of the deltas.

    Raises:
        InputError: if a delta depends on the base, as DoRA's does, or is not that of a LoRA.
    """

    config: dict[str, Any] | None = None

    def __init__(self, files: Sequence[Checkpoint]) -> None:
        self.place = files[0].place
        modules = [(f, named, parts) for f in files for named, parts in Keys.of(f).parts.items()]
        family = find_family(_plain(named) for _, named, _ in modules)
        known: dict[str, _Module] = {}  # by diffusers' names of its rows
        prefixes: list[str] = []
        for file, named, parts in modules:
            shape, rank = _measure(file, named, parts)
            plain = _plain(named)
            names = [flat(part) for part in family.to_diffusers(plain)] or [plain]
            here = {id(known[name]): known[name] for name in names if name in known}
            if any(name in known for name in names) and not all(name in known for name in names):
                what = f"{file.place.path}: {named[:200]}: another file changes a part of its rows"
                raise InputError(what, fix=FIX)
            if not here:
                module = _Module(plain, shape)
                if _is_flat(named):
                    module.flat_prefix = named.removesuffix(plain)
                here = {id(module): module}
                known |= dict.fromkeys(names, module)
            if not _is_flat(named):
                name, prefix = _split_prefix(modern(named))
                prefixes.append(prefix)
                for module in here.values():
                    if flat(module.name) == plain or len(names) == 1 == _count(known, module):
                        module.name, module.flat_prefix = name, ""
            for module in here.values():
                module.rank += rank
        found = list({id(module): module for module in known.values()}.values())
        self._shapes = {f"{module.name}.weight": module.shape for module in found}
        first = self.place.files[0]
        self.specs = {n: Spec(first, "F32", shape, 0, 0) for n, shape in self._shapes.items()}
        flat_prefixes = [module.flat_prefix for module in found if module.flat_prefix]
        self.prefix = next(iter(flat_prefixes or prefixes), "")
        self.rank = max((module.rank for module in found), default=0)

    def __getitem__(self, name: str) -> Tensor:
        return torch.zeros(1).expand(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __repr__(self) -> str:
        return f"NoBase({len(self)} weights, rank {self.rank})"


def is_lora(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a file is a LoRA, or another adapter, and not a model."""
    return Keys.of(checkpoint).is_adapter


def _plain(named: str) -> str:
    """Return the flat name of a module without prefixes."""
    if _is_flat(named):
        return named.removeprefix(next(p for p in FLAT if named.startswith(p)))
    return flat(_split_prefix(modern(named))[0])


def _is_flat(named: str) -> bool:
    return named.startswith(FLAT) and "." not in named


def _count(known: Mapping[str, _Module], module: _Module) -> int:
    return sum(other is module for other in known.values())


def _measure(file: Checkpoint, named: str, parts: Mapping[str, str]) -> tuple[Shape, int]:
    """Return the shape of a delta and its rank."""
    where = f"{file.place.path}: {named[:200]}"
    dora = parts.get("magnitude") or parts.get("dora_scale")
    if dora is not None:
        what = f"{file.place.path}: {dora[:200]}: a DoRA's delta depends on its base"
        raise InputError(what, fix=FIX)
    try:
        product = find_product(file, parts)
    except MissingFactorError as error:
        what = f"{where} lacks one of its factors, {error}"
        raise InputError(what, fix="fetch the file again") from error
    except ValueError as error:
        raise InputError(f"{where}: {error}", fix="fetch the file again") from error
    if product.kind != "LoRA":
        what = f"{where}: the base alone knows the shape that a {product.kind} has"
        raise InputError(what, fix=FIX)
    return product.shape, product.bound


def _split_prefix(name: str) -> tuple[str, str]:
    """Return a module's name inside the denoiser, and the part of a pipeline before it."""
    part = ""
    for prefix in DOTTED:
        if name.startswith(prefix):
            part = "" if prefix == PEFT else prefix.removesuffix(".")
            name = name.removeprefix(prefix)
    return name, part
