"""LoRA files without their base: zeros in the place of the weights that they change, so that a merge of their deltas is a LoRA.

The factors of two LoRA files must not be merged: B_1 A_1 + B_2 A_2 is not (B_1 + B_2) (A_1 + A_2). Their deltas may, and have
a rank of at most the sum of the ranks. Modules are one if their names are, by whatever program they were written. The merge
has the names of the first file; it has kohya's if some module has no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from demerge.errors import InputError
from demerge.lora.adapter import product_shape
from demerge.lora.names import Keys, flat, original, stripped
from demerge.storage.checkpoint import Checkpoint, modern
from demerge.storage.safetensors_header import Spec

RESNETS = 2  # in a block of Stable Diffusion 1, 2 and XL: for kohya's two ways to name a module
DOTTED = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "unet.",
    "transformer.",
)
FIX = "name the base that they were trained on: demerge merge BASE LORA LORA --lora-rank R"


class NoBase(Mapping[str, Tensor]):
    """Zeros by the names of the weights that some LoRA files change.

    Attributes:
        place: where the first file lies.
        specs: shapes, as a checkpoint has them.
        prefix: what a file of the merge names its modules with: unet, or lora_unet_ for kohya's names; empty if no file says.
        rank: the rank that holds every sum of the deltas.

    Raises:
        InputError: if a delta depends on the base, as DoRA's does, or is not one of a LoRA.
    """

    config: dict[str, Any] | None = None

    def __init__(self, files: Sequence[Checkpoint]) -> None:
        self.place = files[0].place
        found: dict[
            str, tuple[str, tuple[int, ...]]
        ] = {}  # one name for all programs -> name here, shape
        ranks: dict[str, int] = {}
        prefixes: list[str] = []
        flat_alone: dict[
            str, str
        ] = {}  # modules without a name in dots -> what kohya has in front of it
        for file in files:
            for named, parts in Keys.of(file).parts.items():
                shape, rank = _size(file, named, parts)
                plain = list(stripped(flat(modern(named))))[-1]
                one = original(plain, RESNETS)
                ranks[one] = ranks.get(one, 0) + rank
                if named.startswith("lora_") and "." not in named:
                    name = plain
                    if one not in found:
                        flat_alone[one] = named.removesuffix(plain)
                else:
                    name, prefix = _undotted(modern(named))
                    prefixes.append(prefix)
                    flat_alone.pop(one, None)
                if one not in found or one not in flat_alone:
                    found[one] = (name, found[one][1] if one in found else shape)
        self._shapes = {f"{name}.weight": shape for name, shape in found.values()}
        self.specs = {
            name: Spec(self.place.files[0], "F32", shape, 0, 0)
            for name, shape in self._shapes.items()
        }
        self.prefix = next(iter(flat_alone.values()), prefixes[0] if prefixes else "")
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


def _size(file: Checkpoint, named: str, parts: Mapping[str, str]) -> tuple[tuple[int, ...], int]:
    """Return the shape of a delta and its rank."""
    where = file.place.path
    dora = parts.get("magnitude") or parts.get("dora_scale")
    if dora is not None:
        raise InputError(f"{where}: {dora[:200]}: a DoRA's delta depends on its base", fix=FIX)
    if "up" not in parts or "down" not in parts:
        raise InputError(
            f"{where}: {named[:200]} lacks one of its factors", fix="fetch the file again"
        )
    shapes = [file.specs[parts[part]].shape for part in ("up", "mid", "down") if part in parts]
    shape = product_shape(shapes)
    if not shape:
        raise InputError(
            f"{where}: {named[:200]}: {' times '.join(map(str, map(list, shapes)))}",
            fix="fetch the file again",
        )
    return shape, shapes[0][1]


def _undotted(name: str) -> tuple[str, str]:
    """Return a name without what is in front of the denoiser's own, and the part of a pipeline that this names."""
    part = ""
    for prefix in DOTTED:
        if name.startswith(prefix):
            part, name = (
                ("" if prefix == DOTTED[0] else prefix.removesuffix(".")),
                name.removeprefix(prefix),
            )
    return name, part
