"""The tensors of a merge, kept on a device, and what a method's statistics say of them.

    held     theta_0 [*], tau_i [K *] and the inputs that the method asks for by name, of each tensor
    known    the statistics that do not depend on the weights, computed once

Whether a statistic depends on the weights is found out by computing it with weights that refuse to be read: one that asks
for their number, device or dtype alone does not depend on them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from demerge.merging.contract import Block, Blocks, Method, Statistic, called
from demerge.merging.engine.reader import CHUNK, Reader, spans
from demerge.merging.engine.validation import Tensors

Weights = Callable[[str | None], Tensor]  # the weights [K] of a tensor; of the model for None
Dtype = torch.dtype | Literal["stored"]


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor: base [*], deltas [K *] or None where all are 0, inputs by name, its first element's index in the model."""

    base: Tensor
    deltas: Tensor | None
    inputs: Mapping[str, Tensor | None]
    start: int


@dataclass(frozen=True)
class Resident:
    """All tensors that are merged.

    Attributes:
        constants: what the method is given beside weights and statistics: its options, ranges, snr.
        dtype: of the arithmetic.
    """

    method: Method
    held: Mapping[str, Held]
    constants: Mapping[str, Any]
    K: int
    dtype: torch.dtype
    _known: dict[tuple[str, str | None], Any] = field(default_factory=dict)
    _moving: set[str] = field(default_factory=set)

    def merged(
        self, weights: Weights, chunk: int | None = None
    ) -> Iterator[tuple[str, slice, Tensor]]:
        """Yield (name, span, result) tensor by tensor, in the arithmetic's dtype.

        Args:
            chunk: elements of a span; None for whole tensors. A method that sees whole tensors has one span each.
        """
        of_model = self._statistics("model", None, weights, {})
        for name, held in self.held.items():
            if held.deltas is None:
                yield name, slice(0, held.base.numel()), held.base.reshape(-1)
                continue
            found = self._statistics("tensor", name, weights, of_model)
            supplied = {**self.constants, **found, "weights": weights(name)}
            for span in self._spans(name, chunk or held.base.numel()):
                block = self._block(name, span, weights)
                given = {**supplied, **block.inputs, "start": block.start}
                yield (
                    name,
                    span,
                    called(self.method.function, block.base, block.deltas, supplied=given).reshape(
                        -1
                    ),
                )

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _spans(self, name: str, step: int) -> list[slice]:
        return spans(self.held[name].base.numel(), step, self.method.whole)

    def _block(self, name: str, span: slice, weights: Weights) -> Block:
        """Return the block of a span; nothing is copied that is kept in the arithmetic's dtype."""
        held, fixed = self.held[name], {"uniform", *self.method.partial}

        def cut(rows: Tensor) -> Tensor:
            return rows if self.method.whole else rows.reshape(len(rows), -1)[:, span]

        base = cut(held.base.unsqueeze(0))[0].to(self.dtype)
        deltas = (
            base.new_zeros(self.K, *base.shape)
            if held.deltas is None
            else cut(held.deltas).to(self.dtype)
        )
        inputs = {
            n: t if t is None or n in self.method.partial else cut(t)
            for n, t in held.inputs.items()
        }
        inputs = {n: t if t is None or n in fixed else t.to(self.dtype) for n, t in inputs.items()}
        return Block(base, deltas, inputs, weights(name), held.start + span.start)

    # -- statistics --------------------------------------------------------------------------------------------------

    def _statistics(
        self, scope: str, name: str | None, weights: Weights, known: Mapping[str, Any]
    ) -> dict[str, Any]:
        found = {s.name: known.get(s.name) for s in self.method.statistics}
        for statistic in self.method.statistics:
            if statistic.scope(self.constants) == scope:
                found[statistic.name] = self._statistic(statistic, name, weights, found)
        return found

    def _statistic(
        self, statistic: Statistic, name: str | None, weights: Weights, earlier: Mapping[str, Any]
    ) -> Any:
        """Return the value that is known, or compute it; it is kept where it depends on nothing that changes."""
        key = (statistic.name, name)
        if key in self._known:
            return self._known[key]
        if statistic.name not in self._moving and self._moving.isdisjoint(
            inspect.signature(statistic.compute).parameters
        ):
            try:
                self._known[key] = self._computed(
                    statistic, name, lambda n: weights(n).as_subclass(Sealed), earlier
                )
                return self._known[key]
            except WeightsWereRead:
                pass
        self._moving.add(statistic.name)
        return self._computed(statistic, name, weights, earlier)

    def _computed(
        self, statistic: Statistic, name: str | None, weights: Weights, earlier: Mapping[str, Any]
    ) -> Any:
        names = [name] if name is not None else list(self.held)
        supplied = {**self.constants, **earlier, "weights": weights(name)}
        return called(statistic.compute, _Blocks(self, names, weights), supplied=supplied)


@dataclass(frozen=True, slots=True)
class _Blocks(Blocks):
    """The blocks of some tensors, of the size that the engine gives them."""

    resident: Resident
    names: Sequence[str]
    weights: Weights

    def __iter__(self) -> Iterator[Block]:
        for name in self.names:
            for span in self.resident._spans(name, CHUNK):
                yield self.resident._block(name, span, self.weights)


class WeightsWereRead(Exception):
    """A statistic looked at the values of the weights."""


class Sealed(Tensor):
    """Weights that can be counted and placed and not be read."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Let through what asks for the shape, the device or the dtype.

        Raises:
            WeightsWereRead: for all else.
        """
        if getattr(function, "__self__", function) not in UNREAD:
            raise WeightsWereRead
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]


UNREAD: tuple[Any, ...] = (
    Tensor.__len__,
    Tensor.device,
    Tensor.dtype,
    Tensor.shape,
    Tensor.ndim,
    Tensor.numel,
    Tensor.size,
)


def bytes_needed(
    base: Tensors,
    K: int,
    inputs: Mapping[str, Sequence[Tensors]],
    *,
    draws: bool = False,
    dtype: Dtype = torch.float32,
) -> int:
    """Return the bytes of base, deltas and inputs on the device, before any of them is read."""
    floating = [tensor for tensor in base.values() if tensor.is_floating_point()]
    numel = sum(tensor.numel() for tensor in floating)
    deltas = sum(K * tensor.numel() * _dtype_of(tensor, dtype).itemsize for tensor in floating)
    given = sum(
        4 * t.numel()
        for sources in inputs.values()
        for tensors in sources
        for t in tensors.values()
    )
    return (
        sum(tensor.nbytes for tensor in floating) + deltas + given + (4 * K * numel if draws else 0)
    )


def load(
    reader: Reader, constants: Mapping[str, Any], device: torch.device, dtype: Dtype
) -> Resident:
    """Read all tensors that are merged onto a device, the deltas rounded to `dtype`.

    Raises:
        InputError: where a tensor holds NaN or Inf.
    """
    held, start = {}, 0
    for name, base in reader.base.items():
        if base.is_floating_point():
            held[name] = _held(reader, name, start, device, _dtype_of(base, dtype))
            start += base.numel()
    wide = any(torch.float64 in (h.base.dtype, _dtype_of(h.base, dtype)) for h in held.values())
    arithmetic = torch.float64 if wide else torch.float32
    return Resident(reader.method, held, constants, len(reader.experts), arithmetic)


def _held(reader: Reader, name: str, start: int, device: torch.device, dtype: torch.dtype) -> Held:
    base, K = reader.base[name].detach(), len(reader.experts)
    weights = torch.ones(K)
    blocks = [reader.block(name, span, weights) for span in reader.spans(name, CHUNK)]
    deltas = (
        torch.cat([b.deltas.reshape(K, -1).to(dtype) for b in blocks], 1)
        if blocks
        else torch.zeros(K, 0)
    )
    inputs: dict[str, Tensor | None] = {}
    for what in blocks[0].inputs if blocks else ():
        parts = [part for block in blocks if (part := block.inputs[what]) is not None]
        whole = reader.method.whole or what in reader.method.partial
        joined = (
            None if not parts else parts[0] if whole else torch.cat(parts, 1).view(K, *base.shape)
        )
        inputs[what] = None if joined is None else joined.to(device, torch.float32)
    moved = deltas.view(K, *base.shape).to(device) if bool(deltas.any()) else None
    return Held(base.to(device, copy=True).contiguous(), moved, inputs, start)


def _dtype_of(base: Tensor, dtype: Dtype) -> torch.dtype:
    return base.dtype if dtype == "stored" else dtype
