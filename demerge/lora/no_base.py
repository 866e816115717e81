"""LoRA files without their base: zeros stand for the weights that they change.

The factors of two LoRA files must not be merged: B_1 A_1 + B_2 A_2 is not (B_1 + B_2) (A_1 + A_2).
Their deltas may, and their rank is at most the sum of the ranks. Modules are the same if their
names are, whatever program wrote them. The merge has the names of the first file; it has kohya's if
some module has no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from demerge.errors import InputError
from demerge.lora.adapter import Shape, as_product, product_shape
from demerge.lora.names import Keys, flat, original, strip_prefixes
from demerge.storage.checkpoint import Checkpoint, modern
from demerge.storage.safetensors_header import Spec

RESNETS = 2  # in a block of Stable Diffusion 1, 2 and XL: for kohya's two ways to name a module
PEFT = "base_model.model."
DOTTED = (PEFT, "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
FIX = "name the base that they were trained on: demerge merge BASE LORA LORA --lora-rank R"


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
        modules: dict[str, tuple[str, Shape]] = {}  # one name for all programs -> name here, shape
        ranks: dict[str, int] = {}
        prefixes: list[str] = []
        kohya: dict[str, str] = {}  # modules without a dotted name -> kohya's prefix of it
        for file in files:
            for named, parts in Keys.of(file).parts.items():
                shape, rank = _measure(file, named, parts)
                plain = list(strip_prefixes(flat(modern(named))))[-1]
                key = original(plain, RESNETS)
                ranks[key] = ranks.get(key, 0) + rank
                name = plain
                if named.startswith("lora_") and "." not in named:
                    if key not in modules:
                        kohya[key] = named.removesuffix(plain)
                else:
                    name, prefix = _split_prefix(modern(named))
                    prefixes.append(prefix)
                    kohya.pop(key, None)
                if key not in modules or key not in kohya:
                    modules[key] = (name, modules[key][1] if key in modules else shape)
        self._shapes = {f"{name}.weight": shape for name, shape in modules.values()}
        first = self.place.files[0]
        self.specs = {n: Spec(first, "F32", shape, 0, 0) for n, shape in self._shapes.items()}
        self.prefix = next(iter(kohya.values()), prefixes[0] if prefixes else "")
        self.rank = max(ranks.values(), default=0)

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


def _measure(file: Checkpoint, named: str, parts: Mapping[str, str]) -> tuple[Shape, int]:
    """Return the shape of a delta and its rank."""
    where = f"{file.place.path}: {named[:200]}"
    dora = parts.get("magnitude") or parts.get("dora_scale")
    if dora is not None:
        what = f"{file.place.path}: {dora[:200]}: a DoRA's delta depends on its base"
        raise InputError(what, fix=FIX)
    if "up" not in parts or "down" not in parts:
        raise InputError(f"{where} lacks one of its factors", fix="fetch the file again")
    shapes = [file.specs[parts[part]].shape for part in ("up", "mid", "down") if part in parts]
    shape = product_shape(shapes)
    if not shape:
        raise InputError(f"{where}: {as_product(shapes)}", fix="fetch the file again")
    return shape, shapes[0][1]


def _split_prefix(name: str) -> tuple[str, str]:
    """Return a module's name inside the denoiser, and the part of a pipeline before it."""
    part = ""
    for prefix in DOTTED:
        if name.startswith(prefix):
            part = "" if prefix == PEFT else prefix.removesuffix(".")
            name = name.removeprefix(prefix)
    return name, part
