r"""A LoRA as an expert: the factors of a file, expanded to the exact deltas of the base's weights.

    delta           s P,   s = alpha / r, or alpha / sqrt(r) for rsLoRA
    DoRA            delta = m V / ||V|| - W_0,   V = W_0 + s P, norm over each output's weights

P is a product of `demerge.lora.products`. DoRA (arXiv 2402.09353), rsLoRA (2312.03732). With a
`dora_scale` of shape [1, in] the norm is over each input's weights. Products are computed in
float64 and rounded once, so that they do not depend on torch's threads.

A delta of a matrix that the base has in parts, or that is a part of the base's, is split by rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from demerge.errors import InputError, listed
from demerge.lora.names import Keys, Modules, Piece, Target
from demerge.lora.products import MissingFactorError, Product, Rows, Shape, find_product, read
from demerge.lora.settings import MERGE_FIRST, Settings, find_config
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.hub import resolve_model_path
from demerge.storage.layout import CheckpointLocation, locate
from demerge.storage.lazy import Lazy
from demerge.storage.names import Span

BLOCK = 1 << 16  # elements of the rows that are made at once; they do not depend on the reader


@dataclass(frozen=True, slots=True)
class Delta:
    """Rows of a module's delta, and the rows of the base's tensor that they change.

    Attributes:
        named: the module, as the file names it.
        scale: s.
        magnitude: the key of DoRA's m, which runs along the base's `axis`.
    """

    named: str
    piece: Piece
    product: Product
    scale: float
    magnitude: str | None = None
    axis: int = 0


class Adapter(Mapping[str, Tensor]):
    """The deltas of a LoRA by the base's tensor names, float32; the rows that are read are made.

    A tensor that the LoRA does not touch is not in the mapping: its delta is 0.

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
        self._deltas = self._find_deltas(keys, settings)
        notes = settings.notes(len(keys.parts))
        if self.skipped:
            notes.append(f"{len(self.skipped)} tensors of text encoders are left out")
        self.notes = tuple(f"{self.place.path}: {note}" for note in notes)
        self._last: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        span = " to ".join(map(str, ranks[:1] + ranks[1:][-1:]))
        return f"Adapter({str(self.place.path)!r}, {len(self)} deltas, rank {span})"

    def __getitem__(self, name: str) -> Tensor:
        deltas = self._deltas[name]
        if name not in self._last:
            self._last = {name: self._expand(name, deltas)}
        return self._last[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    def __contains__(self, name: object) -> bool:
        return name in self._deltas

    @property
    def ranks(self) -> dict[str, int]:
        """The largest rank that each tensor's delta can have."""
        ranks = {}
        for name, deltas in self._deltas.items():
            modules = {delta.named: delta.product.bound for delta in deltas}
            ranks[name] = sum(modules.values())
        return ranks

    # -- what is checked on opening ----------------------------------------------------------------

    def _check_kind(self, keys: Keys, skip_text: bool) -> None:
        for kind, names in keys.foreign.items():
            what = f"{kind}, which demerge does not expand: {listed(names)}"
            self._refuse(what, MERGE_FIRST)
        if keys.unknown:
            what = f"{len(keys.unknown)} keys that are not factors of a LoRA"
            self._refuse(f"{what}: {listed(keys.unknown)}", MERGE_FIRST)
        if keys.text and not skip_text:
            what = "it also changes a text encoder, and only the denoiser is merged"
            fix = f"give --skip-text-encoder to leave that out, or {MERGE_FIRST}"
            self._refuse(f"{what}: {listed(keys.text)}", fix)
        if not keys.parts:
            self._refuse("nothing in it changes the denoiser", "leave it out")

    def _find_deltas(self, keys: Keys, settings: Settings) -> dict[str, list[Delta]]:
        modules = Modules({name: tuple(tensor.shape) for name, tensor in self._base.items()})
        targets = {named: modules.find(named) for named in keys.parts}
        unknown = [named for named, target in targets.items() if target is None]
        if unknown:
            count = f"{len(unknown)} of {len(targets)} modules"
            fix = "name the base it was trained on, or load and save it with diffusers to rename it"
            self._refuse(f"{count} are not in the base by this name: {listed(unknown)}", fix)
        found: dict[str, list[Delta]] = {}
        for named, target in targets.items():
            for delta in self._read_module(named, keys.parts[named], target, modules, settings):
                others = found.setdefault(delta.piece.tensor, [])
                if any(_overlap(delta.piece, other.piece) for other in others):
                    what = f"two deltas of {delta.piece.tensor}, the second in {named}"
                    self._refuse(what, "fetch the file again")
                others.append(delta)
        return {name: found[name] for name in self._base if name in found}

    def _read_module(
        self,
        named: str,
        parts: Mapping[str, str],
        target: Target | None,
        modules: Modules,
        settings: Settings,
    ) -> Iterator[Delta]:
        """Yield the deltas of one module, one for each run of rows."""
        assert target is not None
        magnitude = parts.get("magnitude") or parts.get("dora_scale")
        self._check_dtypes(parts)
        try:
            product = find_product(self._file, parts)
            if settings.use_dora and magnitude is None:
                raise MissingFactorError("magnitude")
            pieces = modules.pieces(target, product.shape[0])
        except MissingFactorError as error:
            what = f"{listed(list(parts.values()))} without {error}"
            self._refuse(what, "fetch the file again")
        except ValueError as error:
            self._refuse(f"{named}: {error}", "name the base that this LoRA was trained on")
        for piece in pieces:
            self._check_shape(named, product, piece)
        axis = 0 if magnitude is None else self._find_axis(magnitude, product, pieces)
        try:
            alpha = self._read_alpha(parts)
            module = modules.module(target)
            scale = 1.0
            if product.kind != "difference":
                scale = settings.scale(module, product.rank, alpha)
        except ValueError as error:
            self._refuse(str(error), "fetch file and configuration again")
        for piece in pieces:
            yield Delta(named, piece, product, scale, magnitude, axis)

    def _check_dtypes(self, parts: Mapping[str, str]) -> None:
        integers = [key for key in parts.values() if not self._file.specs[key].is_float]
        if integers and integers != [parts.get("alpha")]:
            what = f"{integers[0]} is in {self._file.specs[integers[0]].dtype}"
            self._refuse(what, "use factors in floating point")

    def _read_alpha(self, parts: Mapping[str, str]) -> float | None:
        key = parts.get("alpha")
        if key is None:
            return None
        if self._file.specs[key].numel != 1:
            raise ValueError(f"{key} is {list(self._file.specs[key].shape)}, not one number")
        value = float(self._file[key].reshape(()))
        if not math.isfinite(value):
            raise ValueError(f"{key} is {value}")
        return value

    def _check_shape(self, named: str, product: Product, piece: Piece) -> None:
        base = tuple(self._base[piece.tensor].shape)
        rows = (_count(piece.rows, product.shape[0]), *product.shape[1:])
        wanted = (_count(piece.at, base[0] if base else 1), *base[1:])
        if product.kind in ("LoHa", "LoKr"):  # of a convolution they may be matrices
            is_fit = rows[0] == wanted[0] and math.prod(rows) == math.prod(wanted)
        else:
            is_fit = _as_linear(rows) == _as_linear(wanted)
        if not is_fit or (piece.at and piece.at[1] > next(iter(base), 0)):
            what = f"the {product.kind} of {named} is {list(product.shape)}"
            what = f"{what}, {piece.tensor} of the base is {list(base)}"
            self._refuse(what, "name the base that this LoRA was trained on")

    def _find_axis(self, key: str, product: Product, pieces: list[Piece]) -> int:
        """Return the axis of the base that a magnitude runs along: 0 its outputs, 1 its inputs."""
        shape, whole = self._file.specs[key].shape, pieces[0]
        base = list(self._base[whole.tensor].shape)
        outputs, inputs = product.shape[0], base[1]
        is_row = shape[:2] == (1, inputs) and math.prod(shape) == inputs
        if key.endswith(".dora_scale") and outputs > 1 and is_row:
            if whole.rows or whole.at:
                what = f"{key} has a norm over all rows of a matrix that the base has in parts"
                self._refuse(what, MERGE_FIRST)
            return 1
        if math.prod(shape) != outputs or max(shape, default=1) != outputs:
            what = f"{key} is {list(shape)}, {whole.tensor} of the base is {base}"
            self._refuse(what, "name the base that this LoRA was trained on")
        return 0

    def _refuse(self, what: str, fix: str) -> NoReturn:
        raise InputError(f"{self.place.path}: {what}", fix=fix)

    # -- expansion ---------------------------------------------------------------------------------

    def _expand(self, name: str, deltas: list[Delta]) -> Tensor:
        """Return what makes a delta, in blocks of rows of which the last one is kept."""
        base = self._base[name]
        height = base.shape[0] if base.ndim else 1
        width = max(1, base.numel() // height)
        step = max(1, BLOCK // width)
        size = step * width
        if any(delta.magnitude is not None and delta.axis for delta in deltas):
            step, size = height, base.numel()
        last: dict[int, Tensor] = {}
        opened: list[_Opened] = []

        def block(i: int) -> Tensor:
            if i not in last:
                if not opened:
                    opened.extend(_Opened.of(delta, self._file, base) for delta in deltas)
                last.clear()
                last[i] = self._make_rows(opened, i * step, min(height, (i + 1) * step), width)
            return last[i]

        def read(start: int, stop: int) -> Tensor:
            parts = [torch.empty(0)]
            for i in range(start // size, -(-stop // size)):
                parts.append(block(i)[max(0, start - i * size) : stop - i * size])
            return parts[1] if len(parts) == 2 else torch.cat(parts)

        return Lazy.of(base.shape, torch.float32, read)

    @staticmethod
    def _make_rows(opened: list[_Opened], start: int, stop: int, width: int) -> Tensor:
        """Return rows [start, stop) of a tensor's delta, flat."""
        if len(opened) == 1 and opened[0].delta.piece.at is None:
            return opened[0].rows(start, stop).float().reshape(-1)
        dense = torch.zeros(stop - start, width)
        for each in opened:
            first, last = each.delta.piece.at or (0, stop)
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                dense[begin - start : end - start] = each.rows(begin, end)
        return dense.reshape(-1)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A delta whose factors are read; `base` is the weight that a magnitude belongs to."""

    delta: Delta
    product: Rows
    magnitude: Tensor | None
    base: Tensor

    @classmethod
    def of(cls, delta: Delta, file: Checkpoint, base: Tensor) -> _Opened:
        key = delta.magnitude
        magnitude = None if key is None else read(file, key).reshape(-1)
        return cls(delta, delta.product.open(), magnitude, base)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of the base's tensor, in float64."""
        piece, magnitude = self.delta.piece, self.magnitude
        shift = (piece.rows[0] if piece.rows else 0) - (piece.at[0] if piece.at else 0)
        made = self.product(start + shift, stop + shift)
        if self.delta.scale != 1:
            made.mul_(self.delta.scale)
        if magnitude is None:
            return made
        W = self.base.flatten(1)[start:stop].double()
        if self.delta.axis:
            return _decompose(W, made, magnitude, self.base[0, 0].numel())
        return _decompose_rows(W, made, magnitude[start + shift : stop + shift])


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


def _decompose_rows(W: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """Return m V / ||V|| - W [m n], V = W + delta, norm over rows; one that is 0 stays 0."""
    V = W + delta
    norm = V.norm(dim=1)
    return V * torch.where(norm > 0, magnitude / norm, 0).unsqueeze(1) - W


def _decompose(W: Tensor, delta: Tensor, magnitude: Tensor, kernel: int) -> Tensor:
    """Return the same with norms over the columns of each input, of which there are `kernel`."""
    W, delta = (t.unflatten(1, (-1, kernel)).transpose(0, 1) for t in (W, delta))
    made = _decompose_rows(W.flatten(1), delta.flatten(1), magnitude)
    return made.view(W.shape).transpose(0, 1).flatten(1)


def _count(span: Span | None, rows: int) -> int:
    return span[1] - span[0] if span else rows


def _overlap(one: Piece, other: Piece) -> bool:
    if one.at is None or other.at is None:
        return True
    return one.at[0] < other.at[1] and other.at[0] < one.at[1]


def _as_linear(shape: Shape) -> Shape:
    """Return a weight's shape as a linear layer, which a 1 x 1 convolution is."""
    return shape if len(shape) < 3 or shape[-1] != 1 else _as_linear(shape[:-1])
