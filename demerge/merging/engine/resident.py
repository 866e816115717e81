"""The tensors of a merge, kept on a device, and the statistics of a method over them.

tensors    theta_0 [*], tau_i [K *] and the inputs that the method asks for by name
known      the statistics that do not use the weights (`Statistic.uses_weights`), computed once
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from demerge.merging.contract import Block, Blocks, Method, Statistic, call_with
from demerge.merging.engine.reader import CHUNK, Reader, spans
from demerge.merging.engine.validation import Tensors

Weights = Callable[[str | None], Tensor]  # the weights [K] of a tensor; of the model for None
Dtype = torch.dtype | Literal["stored"]


@dataclass(frozen=True, slots=True)
class ResidentTensor:
    """Base [*], deltas [K *] or None if all are 0, inputs by name, its first element's index."""

    base: Tensor
    deltas: Tensor | None
    inputs: Mapping[str, Tensor | None]
    start: int


@dataclass(frozen=True)
class Resident:
    """All tensors that are merged.

    Attributes:
        constants: what the method gets beside weights and statistics: options, ranges, snr.
        dtype: of the arithmetic.
    """

    method: Method
    tensors: Mapping[str, ResidentTensor]
    constants: Mapping[str, Any]
    K: int
    dtype: torch.dtype
    _known: dict[tuple[str, str | None], Any] = field(default_factory=dict)

    def merge(
        self, weights: Weights, chunk: int | None = None
    ) -> Iterator[tuple[str, slice, Tensor]]:
        """Yield (name, span, merged [n]) tensor by tensor, in the arithmetic's dtype.

        Args:
            chunk: elements of a span; None for whole tensors.
        """
        of_model = self._statistics("model", None, weights, {})
        for name, tensor in self.tensors.items():
            numel = tensor.base.numel()
            if tensor.deltas is None:
                yield name, slice(0, numel), tensor.base.reshape(-1)
                continue
            statistics = self._statistics("tensor", name, weights, of_model)
            supplied = {**self.constants, **statistics, "weights": weights(name)}
            for span in self.spans(name, chunk or numel):
                block = self.block(name, span, weights)
                arguments = {**supplied, **block.inputs, "start": block.start}
                merged = call_with(
                    self.method.function, block.base, block.deltas, supplied=arguments
                )
                yield name, span, merged.reshape(-1)

    def spans(self, name: str, step: int) -> list[slice]:
        """Return the spans of a tensor."""
        return spans(self.tensors[name].base.numel(), step, self.method.needs_full_tensor)

    def block(self, name: str, span: slice, weights: Weights) -> Block:
        """Return the block of a span; what has the arithmetic's dtype is not copied."""
        tensor, optional = self.tensors[name], self.method.optional_inputs

        def select(rows: Tensor) -> Tensor:
            if self.method.needs_full_tensor:
                return rows
            return rows.reshape(len(rows), -1)[:, span]

        base = select(tensor.base.unsqueeze(0))[0].to(self.dtype)
        deltas = base.new_zeros(self.K, *base.shape)
        if tensor.deltas is not None:
            deltas = select(tensor.deltas).to(self.dtype)
        inputs: dict[str, Tensor | None] = {}
        for n, values in tensor.inputs.items():
            if values is None or n in optional:
                inputs[n] = values
            else:
                inputs[n] = select(values) if n == "uniform" else select(values).to(self.dtype)
        return Block(base, deltas, inputs, weights(name), tensor.start + span.start)

    def _statistics(
        self, scope: str, name: str | None, weights: Weights, known: Mapping[str, Any]
    ) -> dict[str, Any]:
        found = {s.name: known.get(s.name) for s in self.method.statistics}
        for statistic in self.method.statistics:
            if statistic.scope(self.constants) == scope:
                key = (statistic.name, name)
                if key not in self._known:
                    value = self._compute(statistic, name, weights, found)
                    if statistic.uses_weights:
                        found[statistic.name] = value
                        continue
                    self._known[key] = value
                found[statistic.name] = self._known[key]
        return found

    def _compute(
        self, statistic: Statistic, name: str | None, weights: Weights, earlier: Mapping[str, Any]
    ) -> Any:
        names = list(self.tensors) if name is None else [name]
        blocks = _ResidentBlocks(self, names, weights)
        supplied = {**self.constants, **earlier, "weights": weights(name)}
        return call_with(statistic.compute, blocks, supplied=supplied)


@dataclass(frozen=True, slots=True)
class _ResidentBlocks(Blocks):
    """The blocks of some tensors, of the size that the engine gives them."""

    resident: Resident
    names: Sequence[str]
    weights: Weights

    def __iter__(self) -> Iterator[Block]:
        for name in self.names:
            for span in self.resident.spans(name, CHUNK):
                yield self.resident.block(name, span, self.weights)


def bytes_needed(
    base: Tensors,
    K: int,
    inputs: Mapping[str, Sequence[Tensors]],
    *,
    needs_random: bool = False,
    dtype: Dtype = torch.float32,
) -> int:
    """Return the bytes of base, deltas and inputs on the device, before any of them is read."""
    total = 0
    for tensor in base.values():
        if tensor.is_floating_point():
            each = _dtype_of(tensor, dtype).itemsize + (4 if needs_random else 0)
            total += tensor.nbytes + K * tensor.numel() * each
    for sources in inputs.values():
        for tensors in sources:
            total += sum(4 * tensor.numel() for tensor in tensors.values())
    return total


def load(
    reader: Reader, constants: Mapping[str, Any], device: torch.device, dtype: Dtype
) -> Resident:
    """Read all tensors that are merged onto a device, the deltas rounded to `dtype`."""
    tensors: dict[str, ResidentTensor] = {}
    start, arithmetic = 0, torch.float32
    for name, base in reader.base.items():
        if base.is_floating_point():
            stored = _dtype_of(base, dtype)
            tensors[name] = _load_tensor(reader, name, start, device, stored)
            start += base.numel()
            if torch.float64 in (base.dtype, stored):
                arithmetic = torch.float64
    return Resident(reader.method, tensors, constants, len(reader.experts), arithmetic)


def _load_tensor(
    reader: Reader, name: str, start: int, device: torch.device, dtype: torch.dtype
) -> ResidentTensor:
    base, K = reader.base[name].detach(), len(reader.experts)
    weights = torch.ones(K)
    blocks = [reader.block(name, span, weights) for span in reader.spans(name, CHUNK)]
    if not blocks:
        return ResidentTensor(base.to(device, copy=True).contiguous(), None, {}, start)
    rows = torch.cat([b.deltas.reshape(K, -1).to(dtype) for b in blocks], 1)
    deltas = rows.view(K, *base.shape).to(device) if bool(rows.any()) else None
    inputs: dict[str, Tensor | None] = {}
    for what, first in blocks[0].inputs.items():
        if first is None:
            inputs[what] = None
            continue
        if not (reader.method.needs_full_tensor or what in reader.method.optional_inputs):
            parts = [part for block in blocks if (part := block.inputs[what]) is not None]
            first = torch.cat(parts, 1).view(K, *base.shape)
        inputs[what] = first.to(device, torch.float32)
    return ResidentTensor(base.to(device, copy=True).contiguous(), deltas, inputs, start)


def _dtype_of(base: Tensor, dtype: Dtype) -> torch.dtype:
    return base.dtype if dtype == "stored" else dtype
