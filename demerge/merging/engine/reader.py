"""The chunks that a merge reads: spans of tensors, and their deltas.

    tau_i = theta_i - theta_0

in float32 for 16-bit inputs and in float64 for wider ones, so that what a method makes of them is rounded once. No more
than a chunk of each expert is in memory for each worker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from demerge.errors import InputError, NumericalError
from demerge.merging.contract import Block, Method
from demerge.merging.engine.validation import Tensors, holds_deltas
from demerge.randomness import key_of
from demerge.storage.checkpoint import finite

CHUNK = 1 << 18  # elements per expert: the chunks of all experts fit the caches
PHILOX_VALUES = 8  # 32-bit values per step of the counter


@dataclass(frozen=True)
class Reader:
    """Reads the blocks of base and experts that a method needs.

    Attributes:
        inputs: by name, the tensors of each expert that the method needs beside its weights.
        names: what base and experts are called in errors.
    """

    method: Method
    base: Tensors
    experts: Sequence[Tensors]
    inputs: Mapping[str, Sequence[Tensors]] = field(default_factory=dict)
    seed: int = 0
    names: Sequence[str] = ()
    device: str = "cpu"

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: float32 where all inputs are narrower, else, or for a precise method, float64."""
        if self.method.precise:
            return torch.float64
        held = [self.base, *(e for e in self.experts if not holds_deltas(e))]
        wide = any(
            t.dtype.itemsize > 2
            for tensors in held
            for t in tensors.values()
            if t.is_floating_point()
        )
        return torch.float64 if wide else torch.float32

    def spans(self, name: str, step: int) -> list[slice]:
        """Return the spans that a tensor is read in; one for a method that sees whole tensors."""
        return spans(self.base[name].numel(), step, self.method.whole)

    def block(self, name: str, span: slice, weights: Tensor, offset: int = 0) -> Block:
        """Read the block of a span; `offset` is the number of elements in the tensors before this one.

        Raises:
            InputError: where a tensor holds NaN or Inf.
            NumericalError: where a difference is too large for the arithmetic.
        """
        source = self.base[name]
        base = self._read(source, span)
        deltas = self._deltas(base, name, span)
        if not (finite(base) and finite(deltas)):
            self._name_the_culprit(name)
        inputs = {n: self._input(n, name, span) for n in self.inputs}
        if self.method.draws:
            keys = [key_of(self.seed, self.method.name, i, name) for i in range(len(deltas))]
            inputs["uniform"] = uniform(keys, span).to(self.device)
        if not self.method.whole:
            return Block(base, deltas, inputs, weights, offset + span.start)
        shaped = {
            n: t if t is None or n in self.method.partial else t.view(-1, *source.shape)
            for n, t in inputs.items()
        }
        return Block(
            base.view(source.shape), deltas.view(-1, *source.shape), shaped, weights, offset
        )

    def stored(self, expert: int, name: str, span: slice, base: Tensor) -> Tensor:
        """Return the weights of an expert [n], as they are stored where they are."""
        held = self.experts[expert]
        if name not in held:
            return base
        return (
            base + self._read(held[name], span)
            if holds_deltas(held)
            else self._read(held[name], span)
        )

    def _read(self, tensor: Tensor, span: slice) -> Tensor:
        return tensor.detach().reshape(-1)[span].to(self.device, self.dtype)

    def _deltas(self, base: Tensor, name: str, span: slice) -> Tensor:
        deltas = torch.empty(len(self.experts), len(base), dtype=self.dtype, device=self.device)
        for delta, expert in zip(deltas, self.experts, strict=True):
            if name in expert:
                delta.copy_(expert[name].detach().reshape(-1)[span])
            else:
                delta.zero_()
        tuned = [
            i
            for i, expert in enumerate(self.experts)
            if name in expert and not holds_deltas(expert)
        ]
        if len(tuned) == len(deltas):
            return deltas.sub_(base)
        for i in tuned:
            deltas[i].sub_(base)
        return deltas

    def _input(self, what: str, name: str, span: slice) -> Tensor | None:
        sources = self.inputs[what]
        if what not in self.method.partial:
            found = torch.stack([self._read(tensors[name], span) for tensors in sources])
        elif all(name in tensors for tensors in sources):
            found = torch.stack(
                [tensors[name].detach().to(self.device, self.dtype) for tensors in sources]
            )
        else:
            return None
        if not finite(found):
            culprit = next(i for i, tensors in enumerate(sources) if not finite(tensors[name]))
            raise InputError(
                f"{what} of expert {culprit}: tensor {name} holds NaN or Inf",
                fix=f"make {what}.safetensors again",
            )
        return found

    def _name_the_culprit(self, name: str) -> None:
        names = self.names or ["the base", *(f"expert {i}" for i in range(len(self.experts)))]
        for source, label in zip([self.base, *self.experts], names, strict=True):
            if name in source and not finite(source[name].reshape(-1)):
                raise InputError(
                    f"{label}: tensor {name} holds NaN or Inf",
                    fix="use another checkpoint of this model",
                )
        raise NumericalError(
            f"tensor {name}: a difference to the base exceeds {self.dtype}", fix="check the experts"
        )


def spans(numel: int, step: int, whole: bool) -> list[slice]:
    """Return the spans of `step` elements that cover [0, numel); one for a method that sees whole tensors."""
    step = max(1, numel if whole else step)
    return [slice(start, min(start + step, numel)) for start in range(0, numel, step)]


def uniform(keys: Sequence[int], span: slice) -> Tensor:
    """Return the random numbers of a span of each key's stream, [K n] float32 in [0, 1), multiples of 2^-24.

    Value j lies in step j // 8 of the counter, so any span is reached without drawing what comes before it.
    """
    first = span.start // PHILOX_VALUES
    steps = -(-span.stop // PHILOX_VALUES) - first
    skipped = span.start - first * PHILOX_VALUES
    values = torch.empty(len(keys), span.stop - span.start)
    for row, key in zip(values, keys, strict=True):
        bits = (
            np.random.Philox(key=key)
            .advance(first)
            .random_raw(steps * 4)
            .astype("<u8", copy=False)
            .view("<u4")
        )
        row.copy_(
            torch.from_numpy(np.right_shift(bits, 8, out=bits).view("<i4"))[
                skipped : skipped + len(row)
            ]
        )
    return values.mul_(2.0**-24)


@contextlib.contextmanager
def chunked_work() -> Iterator[None]:
    """Prepare torch and the allocator for many small operations.

    Torch must not split them: its idle threads spin. And glibc must not give the memory of each chunk back to the system:
    it keeps what is smaller than the largest block it has seen freed, up to 32 MB.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.empty(31 << 20, dtype=torch.uint8)
    try:
        yield
    finally:
        torch.set_num_threads(before)
