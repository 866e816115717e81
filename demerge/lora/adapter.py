r"""A LoRA as an expert: the factors of a file, expanded to the exact deltas of the base's weights.

    delta           s B A,   s = alpha / r, or alpha / sqrt(r) for rsLoRA
    convolution     delta[o, i, h, w] = s sum_p B[o, p] A[p, i, h, w]
    with a middle   delta[o, i, h, w] = s sum_pq B[o, p] M[p, q, h, w] A[q, i]
    DoRA            delta = m V / ||V|| - W_0,   V = W_0 + s B A, the norm over each output's weights

LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353). A `dora_scale` of shape [1, in] says that the norm is over
each input's weights. Products are taken in float64 and rounded once, so that they do not depend on torch's threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from demerge.errors import InputError, listed
from demerge.lora.names import Keys, Modules
from demerge.lora.settings import Settings, config_beside
from demerge.storage.checkpoint import Checkpoint, finite
from demerge.storage.hub import resolve_model_path
from demerge.storage.layout import CheckpointLocation, locate

BLOCK = 1 << 20  # elements in float64 at once
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Factors:
    """The parts of one delta: keys of the file, the axis of the base that DoRA's magnitude runs along, and s."""

    down: str
    up: str
    mid: str | None
    magnitude: str | None
    axis: int
    scale: float


class Adapter(Mapping[str, Tensor]):
    """The deltas of a LoRA by the base's tensor names, float32 in the base's shapes, expanded when they are read.

    A tensor that the LoRA does not touch is not in the mapping: its delta is 0. The last one that was read is kept.

    Attributes:
        place: where it lies; its files are what a recipe hashes.
        skipped: keys of text encoders that were left out because the caller allowed it.
        notes: what had to be supposed about it, for a person.
    """

    holds_deltas = True
    config: dict[str, Any] | None = None

    def __init__(
        self, checkpoint: Checkpoint, base: Mapping[str, Tensor], *, skip_text: bool = False
    ) -> None:
        config = config_beside(checkpoint)
        self.place = replace(
            checkpoint.place, files=(*checkpoint.place.files, *([config] if config else []))
        )
        self._file, self._base = checkpoint, base
        keys = Keys.of(checkpoint)
        self._check_kind(keys, skip_text)
        self.skipped = tuple(keys.text)
        settings = Settings.of(checkpoint)
        self._factors = self._resolved(keys, settings)
        left = (
            [f"{len(self.skipped)} tensors of text encoders are left out"] if self.skipped else []
        )
        self.notes = tuple(
            f"{self.place.path}: {note}" for note in (*settings.notes(len(self._factors)), *left)
        )
        self._held: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        return f"Adapter({str(self.place.path)!r}, {len(self)} deltas, rank {' to '.join(map(str, ranks[:1] + ranks[1:][-1:]))})"

    def __getitem__(self, name: str) -> Tensor:
        factors = self._factors[name]
        if name not in self._held:
            self._held = {}  # before the next is expanded
            self._held = {name: self._expanded(name, factors)}
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def __contains__(self, name: object) -> bool:
        return name in self._factors

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each tensor's delta."""
        return {
            name: self._file.specs[factors.down].shape[0] for name, factors in self._factors.items()
        }

    # -- what is checked on opening ----------------------------------------------------------------------------------

    def _check_kind(self, keys: Keys, skip_text: bool) -> None:
        for kind, names in keys.foreign.items():
            self._refuse(
                f"{kind}, which demerge does not expand: {listed(names)}",
                "merge it into its base first",
            )
        if keys.unknown:
            self._refuse(
                f"keys that are no factors of a LoRA: {listed(keys.unknown)}",
                "merge it into its base first",
            )
        if keys.text and not skip_text:
            what = f"it changes a text encoder as well, and only the denoiser is merged: {listed(keys.text)}"
            self._refuse(
                what, "give --skip-text-encoder to leave that out, or merge it into its base first"
            )
        if not keys.parts:
            self._refuse("nothing in it changes the denoiser", "leave it out")

    def _resolved(self, keys: Keys, settings: Settings) -> dict[str, Factors]:
        modules = Modules(name for name, tensor in self._base.items() if tensor.ndim > 1)
        tensors = {named: modules.find(named) for named in keys.parts}
        unknown = [named for named, tensor in tensors.items() if tensor is None]
        if unknown:
            what = f"{len(unknown)} of {len(tensors)} modules are not in the base by this name: {listed(unknown)}"
            self._refuse(
                what,
                "name the base it was trained on; load and save it with diffusers to have its names rewritten",
            )
        found: dict[str, Factors] = {}
        for named, tensor in tensors.items():
            if tensor is None or tensor in found:
                self._refuse(
                    f"two deltas of {tensor}, the second in {named}", "fetch the file again"
                )
            found[tensor] = self._settled(
                tensor, keys.parts[named], settings, modules.module(tensor)
            )
        return {name: found[name] for name in self._base if name in found}

    def _settled(
        self, tensor: str, parts: Mapping[str, str], settings: Settings, module: str
    ) -> Factors:
        magnitude = parts.get("magnitude") or parts.get("dora_scale")
        absent = [part for part in ("down", "up") if part not in parts]
        absent += ["magnitude"] if settings.dora and magnitude is None else []
        if absent:
            self._refuse(
                f"{listed(list(parts.values()))} without {' and '.join(absent)}",
                "fetch the file again",
            )
        integers = [key for key in parts.values() if not self._file.specs[key].is_float]
        if integers and integers != [parts.get("alpha")]:
            self._refuse(
                f"{integers[0]} is in {self._file.specs[integers[0]].dtype}",
                "use factors in floating point",
            )
        down, up, mid = parts["down"], parts["up"], parts.get("mid")
        self._check_shapes(tensor, down, mid, up)
        axis = 0 if magnitude is None else self._axis(tensor, magnitude)
        try:
            scale = settings.scale(
                module, self._file.specs[down].shape[0], self._alpha(parts.get("alpha"))
            )
        except ValueError as error:
            self._refuse(str(error), "fetch file and configuration again")
        return Factors(down, up, mid, magnitude, axis, scale)

    def _alpha(self, key: str | None) -> float | None:
        if key is None:
            return None
        if self._file.specs[key].numel != 1:
            raise ValueError(f"{key} is {list(self._file.specs[key].shape)}, not one number")
        value = float(self._file[key].reshape(()))
        if not math.isfinite(value):
            raise ValueError(f"{key} is {value}")
        return value

    def _check_shapes(self, tensor: str, down: str, mid: str | None, up: str) -> None:
        shapes = [self._file.specs[key].shape for key in (up, mid, down) if key is not None]
        base = tuple(self._base[tensor].shape)
        if _as_linear(product_shape(shapes)) != _as_linear(base):
            factors = " times ".join(str(list(shape)) for shape in shapes)
            what = f"{up} and {down} are {factors}, {tensor} of the base is {list(base)}"
            self._refuse(what, "name the base that this LoRA was trained on")

    def _axis(self, tensor: str, key: str) -> int:
        """Return the axis of the base that a magnitude runs along: 0 its outputs, 1 its inputs."""
        shape, (outputs, inputs) = self._file.specs[key].shape, self._base[tensor].shape[:2]
        if (
            key.endswith(".dora_scale")
            and outputs > 1
            and shape[:2] == (1, inputs)
            and math.prod(shape) == inputs
        ):
            return 1
        if math.prod(shape) != outputs or max(shape, default=1) != outputs:
            what = (
                f"{key} is {list(shape)}, {tensor} of the base is {list(self._base[tensor].shape)}"
            )
            self._refuse(what, "name the base that this LoRA was trained on")
        return 0

    def _refuse(self, what: str, fix: str) -> NoReturn:
        raise InputError(f"{self.place.path}: {what}", fix=fix)

    # -- expansion ---------------------------------------------------------------------------------------------------

    def _expanded(self, name: str, factors: Factors) -> Tensor:
        base = self._base[name]
        A, B = (self._file[key].double().flatten(1) for key in (factors.down, factors.up))
        if factors.mid is not None:
            A = torch.einsum("pqk,qi->pik", self._file[factors.mid].double().flatten(2), A).flatten(
                1
            )
        blocks = ((rows @ A).mul_(factors.scale) for rows in B.split(max(1, BLOCK // A.shape[1])))
        if factors.magnitude is None:
            dense = torch.cat([block.float() for block in blocks]).view(base.shape)
        else:
            m = self._file[factors.magnitude].double().reshape(-1)
            dense = _decomposed(
                base.double(), torch.cat(list(blocks)).view(base.shape), m, factors.axis
            ).float()
        if not finite(dense):
            self._refuse(
                f"{factors.up} and {factors.down} make NaN or Inf", "use another file of this LoRA"
            )
        return dense


def open_expert(
    path: str | Path | CheckpointLocation,
    base: Mapping[str, Tensor],
    *,
    variant: str | None = None,
    skip_text: bool = False,
) -> Checkpoint | Adapter:
    """Open what was finetuned from a base: a model, under the base's names, or a LoRA; the keys of the file decide.

    Args:
        skip_text: leave out what a LoRA does to text encoders, which is refused else.

    Raises:
        InputError: where it is damaged, or a LoRA that does not fit the base or is of another kind.
    """
    place = (
        path
        if isinstance(path, CheckpointLocation)
        else locate(resolve_model_path(path, variant), variant)
    )
    checkpoint = Checkpoint(place)
    adapter = Keys.of(checkpoint).is_adapter
    if Keys.of(base).is_adapter:
        where = f"{base.place.path} is" if isinstance(base, Checkpoint) else "the base is"
        raise InputError(
            f"{where} a LoRA, which cannot stand in the base's place",
            fix="name the model that it was trained on",
        )
    return (
        Adapter(checkpoint, base, skip_text=skip_text) if adapter else checkpoint.named_like(base)
    )


def notes_of(experts: Iterable[object]) -> list[str]:
    """Return what had to be supposed about those experts that are LoRA files."""
    return [note for expert in experts if isinstance(expert, Adapter) for note in expert.notes]


def _decomposed(W: Tensor, delta: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """Return m V / ||V|| - W [*], V = W + delta; a row or column of V that is 0 stays 0."""
    V = W + delta
    norm = V.transpose(0, axis).flatten(1).norm(dim=1)
    ratio = torch.where(norm > 0, magnitude / norm, 0)
    return V * ratio.view([-1 if d == axis else 1 for d in range(V.ndim)]) - W


def product_shape(shapes: Sequence[Shape]) -> Shape:
    """Return the shape of B A or B M A from those of its factors, () if they do not chain."""
    up, *middle, down = shapes
    if len(up) < 2 or len(down) < 2 or math.prod(up[2:]) != 1 or 0 in (*up, *down):
        return ()
    if not middle:
        return (up[0], *down[1:]) if up[1] == down[0] else ()
    mid = middle[0]
    chained = len(mid) > 2 and mid[:2] == (up[1], down[0]) and math.prod(down[2:]) == 1
    return (up[0], down[1], *mid[2:]) if chained else ()


def _as_linear(shape: Shape) -> Shape:
    """Return a weight's shape without the ones behind its second axis: a 1 x 1 convolution is a linear layer."""
    return shape if len(shape) < 3 or shape[-1] != 1 else _as_linear(shape[:-1])
