r"""A LoRA as an expert: the factors of a file, expanded to the exact deltas of the base's weights.

    delta           s B A,   s = alpha / r, or alpha / sqrt(r) for rsLoRA
    convolution     delta[o, i, h, w] = s sum_p B[o, p] A[p, i, h, w]
    with a middle   delta[o, i, h, w] = s sum_pq B[o, p] M[p, q, h, w] A[q, i]
    DoRA            delta = m V / ||V|| - W_0,   V = W_0 + s B A, norm over each output's weights

LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353). With a `dora_scale` of shape
[1, in] the norm is over each input's weights. Products are computed in float64 and rounded once, so
that they do not depend on torch's threads.
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
from demerge.lora.settings import MERGE_FIRST, Settings, find_config
from demerge.storage.checkpoint import Checkpoint, finite
from demerge.storage.hub import resolve_model_path
from demerge.storage.layout import CheckpointLocation, locate

BLOCK = 1 << 20  # elements in float64 at once
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Factors:
    """The keys of one delta's parts, the base's axis that DoRA's magnitude runs along, and s."""

    down: str
    up: str
    mid: str | None
    magnitude: str | None
    axis: int
    scale: float


class Adapter(Mapping[str, Tensor]):
    """The deltas of a LoRA by the base's tensor names, float32, expanded when they are read.

    A tensor that the LoRA does not touch is not in the mapping: its delta is 0. The last one that
    was read is kept.

    Attributes:
        place: where it lies; its files are what a recipe hashes.
        skipped: keys of text encoders that were left out because the caller allowed it.
        notes: what was assumed about it, for a person.
    """

    holds_deltas = True
    config: dict[str, Any] | None = None

    def __init__(
        self, checkpoint: Checkpoint, base: Mapping[str, Tensor], *, skip_text: bool = False
    ) -> None:
        place, config = checkpoint.place, find_config(checkpoint)
        self.place = place if config is None else replace(place, files=(*place.files, config))
        self._file, self._base = checkpoint, base
        keys = Keys.of(checkpoint)
        self._check_kind(keys, skip_text)
        self.skipped = tuple(keys.text)
        settings = Settings.of(checkpoint)
        self._factors = self._find_factors(keys, settings)
        notes = settings.notes(len(self._factors))
        if self.skipped:
            notes.append(f"{len(self.skipped)} tensors of text encoders are left out")
        self.notes = tuple(f"{self.place.path}: {note}" for note in notes)
        self._last: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        span = " to ".join(map(str, ranks[:1] + ranks[1:][-1:]))
        return f"Adapter({str(self.place.path)!r}, {len(self)} deltas, rank {span})"

    def __getitem__(self, name: str) -> Tensor:
        factors = self._factors[name]
        if name not in self._last:
            self._last = {}  # before the next is expanded
            self._last = {name: self._expand(name, factors)}
        return self._last[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def __contains__(self, name: object) -> bool:
        return name in self._factors

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each tensor's delta."""
        return {name: self._shape(factors.down)[0] for name, factors in self._factors.items()}

    def _shape(self, key: str) -> Shape:
        return self._file.specs[key].shape

    # -- what is checked on opening ----------------------------------------------------------------

    def _check_kind(self, keys: Keys, skip_text: bool) -> None:
        for kind, names in keys.foreign.items():
            what = f"{kind}, which demerge does not expand: {listed(names)}"
            self._refuse(what, MERGE_FIRST)
        if keys.unknown:
            what = f"keys that are not factors of a LoRA: {listed(keys.unknown)}"
            self._refuse(what, MERGE_FIRST)
        if keys.text and not skip_text:
            what = "it also changes a text encoder, and only the denoiser is merged"
            fix = f"give --skip-text-encoder to leave that out, or {MERGE_FIRST}"
            self._refuse(f"{what}: {listed(keys.text)}", fix)
        if not keys.parts:
            self._refuse("nothing in it changes the denoiser", "leave it out")

    def _find_factors(self, keys: Keys, settings: Settings) -> dict[str, Factors]:
        modules = Modules(name for name, tensor in self._base.items() if tensor.ndim > 1)
        tensors = {named: modules.find(named) for named in keys.parts}
        unknown = [named for named, tensor in tensors.items() if tensor is None]
        if unknown:
            count = f"{len(unknown)} of {len(tensors)} modules"
            fix = "name the base it was trained on, or load and save it with diffusers to rename it"
            self._refuse(f"{count} are not in the base by this name: {listed(unknown)}", fix)
        factors: dict[str, Factors] = {}
        for named, tensor in tensors.items():
            if tensor is None or tensor in factors:
                what = f"two deltas of {tensor}, the second in {named}"
                self._refuse(what, "fetch the file again")
            module = modules.module(tensor)
            factors[tensor] = self._check_parts(tensor, keys.parts[named], settings, module)
        return {name: factors[name] for name in self._base if name in factors}

    def _check_parts(
        self, tensor: str, parts: Mapping[str, str], settings: Settings, module: str
    ) -> Factors:
        magnitude = parts.get("magnitude") or parts.get("dora_scale")
        absent = [part for part in ("down", "up") if part not in parts]
        if settings.use_dora and magnitude is None:
            absent.append("magnitude")
        if absent:
            what = f"{listed(list(parts.values()))} without {' and '.join(absent)}"
            self._refuse(what, "fetch the file again")
        integers = [key for key in parts.values() if not self._file.specs[key].is_float]
        if integers and integers != [parts.get("alpha")]:
            what = f"{integers[0]} is in {self._file.specs[integers[0]].dtype}"
            self._refuse(what, "use factors in floating point")
        down, up, mid = parts["down"], parts["up"], parts.get("mid")
        self._check_shapes(tensor, down, mid, up)
        axis = 0 if magnitude is None else self._find_axis(tensor, magnitude)
        try:
            scale = settings.scale(module, self._shape(down)[0], self._read_alpha(parts))
        except ValueError as error:
            self._refuse(str(error), "fetch file and configuration again")
        return Factors(down, up, mid, magnitude, axis, scale)

    def _read_alpha(self, parts: Mapping[str, str]) -> float | None:
        key = parts.get("alpha")
        if key is None:
            return None
        if self._file.specs[key].numel != 1:
            raise ValueError(f"{key} is {list(self._shape(key))}, not one number")
        value = float(self._file[key].reshape(()))
        if not math.isfinite(value):
            raise ValueError(f"{key} is {value}")
        return value

    def _check_shapes(self, tensor: str, down: str, mid: str | None, up: str) -> None:
        shapes = [self._shape(key) for key in (up, mid, down) if key is not None]
        base = tuple(self._base[tensor].shape)
        if _as_linear(product_shape(shapes)) != _as_linear(base):
            what = f"{up} and {down} are {as_product(shapes)}, {tensor} of the base is {list(base)}"
            self._refuse(what, "name the base that this LoRA was trained on")

    def _find_axis(self, tensor: str, key: str) -> int:
        """Return the axis of the base that a magnitude runs along: 0 its outputs, 1 its inputs."""
        shape, base = self._shape(key), list(self._base[tensor].shape)
        outputs, inputs = base[:2]
        is_row = shape[:2] == (1, inputs) and math.prod(shape) == inputs
        if key.endswith(".dora_scale") and outputs > 1 and is_row:
            return 1
        if math.prod(shape) != outputs or max(shape, default=1) != outputs:
            what = f"{key} is {list(shape)}, {tensor} of the base is {base}"
            self._refuse(what, "name the base that this LoRA was trained on")
        return 0

    def _refuse(self, what: str, fix: str) -> NoReturn:
        raise InputError(f"{self.place.path}: {what}", fix=fix)

    # -- expansion ---------------------------------------------------------------------------------

    def _expand(self, name: str, factors: Factors) -> Tensor:
        base, file = self._base[name], self._file
        A, B = (file[key].double().flatten(1) for key in (factors.down, factors.up))
        if factors.mid is not None:
            M = file[factors.mid].double().flatten(2)
            A = torch.einsum("pqk,qi->pik", M, A).flatten(1)
        blocks = ((rows @ A).mul_(factors.scale) for rows in B.split(max(1, BLOCK // A.shape[1])))
        if factors.magnitude is None:
            dense = torch.cat([block.float() for block in blocks]).view(base.shape)
        else:
            m = file[factors.magnitude].double().reshape(-1)
            delta = torch.cat(list(blocks)).view(base.shape)
            dense = _decompose(base.double(), delta, m, factors.axis).float()
        if not finite(dense):
            what = f"{factors.up} and {factors.down} make NaN or Inf"
            self._refuse(what, "use another file of this LoRA")
        return dense


def open_expert(
    path: str | Path | CheckpointLocation,
    base: Mapping[str, Tensor],
    *,
    variant: str | None = None,
    skip_text: bool = False,
) -> Checkpoint | Adapter:
    """Open what was finetuned from a base: a model, under the base's names, or a LoRA.

    Args:
        skip_text: ignore what a LoRA does to text encoders, which is an error otherwise.

    Raises:
        InputError: if it is damaged, or a LoRA that does not fit the base or is of another kind.
    """
    place = path
    if not isinstance(place, CheckpointLocation):
        place = locate(resolve_model_path(place, variant), variant)
    if Keys.of(base).is_adapter:
        where = str(base.place.path) if isinstance(base, Checkpoint) else "the base"
        what = f"{where} is a LoRA, which cannot stand in the base's place"
        raise InputError(what, fix="name the model that it was trained on")
    checkpoint = Checkpoint(place)
    if Keys.of(checkpoint).is_adapter:
        return Adapter(checkpoint, base, skip_text=skip_text)
    return checkpoint.named_like(base)


def notes_of(experts: Iterable[object]) -> list[str]:
    """Return what was assumed about those experts that are LoRA files."""
    return [note for expert in experts if isinstance(expert, Adapter) for note in expert.notes]


def _decompose(W: Tensor, delta: Tensor, magnitude: Tensor, axis: int) -> Tensor:
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


def as_product(shapes: Sequence[Shape]) -> str:
    """Return the shapes of factors as text: `[4, 2] times [2, 3]`."""
    return " times ".join(str(list(shape)) for shape in shapes)


def _as_linear(shape: Shape) -> Shape:
    """Return a weight's shape as a linear layer, which a 1 x 1 convolution is."""
    return shape if len(shape) < 3 or shape[-1] != 1 else _as_linear(shape[:-1])
