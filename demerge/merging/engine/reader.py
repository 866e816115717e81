"""The chunks that a merge reads: spans of tensors, and their deltas.

    tau_i = theta_i - theta_0

in float32 for 16-bit inputs and in float64 for wider ones, so that what a method makes of them is
rounded once. Each worker holds no more than a chunk of each expert.
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
        """The dtype of the arithmetic: float32 if all inputs are 16-bit or less, else float64."""
        if self.method.force_float64:
            return torch.float64
        for tensors in (self.base, *(e for e in self.experts if not holds_deltas(e))):
            if any(t.is_floating_point() and t.dtype.itemsize > 2 for t in tensors.values()):
                return torch.float64
        return torch.float32

    def spans(self, name: str, step: int) -> list[slice]:
        """Return the spans that a tensor is read in; one for a method that needs full tensors."""
        return spans(self.base[name].numel(), step, self.method.needs_full_tensor)

    def block(self, name: str, span: slice, weights: Tensor, offset: int = 0) -> Block:
        """Read the block of a span; `offset` is the number of elements before this tensor."""
        source = self.base[name]
        base = self._read(source, span)
        deltas = self._deltas(base, name, span)
        if not (finite(base) and finite(deltas)):
            self._raise_not_finite(name)
        inputs = {n: self._input(n, name, span) for n in self.inputs}
        if self.method.needs_random:
            keys = [key_of(self.seed, self.method.name, i, name) for i in range(len(deltas))]
            inputs["uniform"] = uniform(keys, span).to(self.device)
        if not self.method.needs_full_tensor:
            return Block(base, deltas, inputs, weights, offset + span.start)
        shape = source.shape
        for n, tensor in inputs.items():
            if tensor is not None and n not in self.method.optional_inputs:
                inputs[n] = tensor.view(-1, *shape)
        return Block(base.view(shape), deltas.view(-1, *shape), inputs, weights, offset)

    def stored(self, expert: int, name: str, span: slice, base: Tensor) -> Tensor:
        """Return the weights of an expert [n], as it stores them if it does."""
        tensors = self.experts[expert]
        if name not in tensors:
            return base
        values = self._read(tensors[name], span)
        return base + values if holds_deltas(tensors) else values

    def _read(self, tensor: Tensor, span: slice) -> Tensor:
        return tensor.detach().reshape(-1)[span].to(self.device, self.dtype)

    def _deltas(self, base: Tensor, name: str, span: slice) -> Tensor:
        deltas = torch.empty(len(self.experts), len(base), dtype=self.dtype, device=self.device)
        models = []  # the experts that hold weights, not deltas
        for i, expert in enumerate(self.experts):
            if name not in expert:
                deltas[i].zero_()
                continue
            deltas[i].copy_(expert[name].detach().reshape(-1)[span])
            if not holds_deltas(expert):
                models.append(i)
        if len(models) == len(deltas):
            return deltas.sub_(base)
        for i in models:
            deltas[i].sub_(base)
        return deltas

    def _input(self, what: str, name: str, span: slice) -> Tensor | None:
        sources = self.inputs[what]
        if what not in self.method.optional_inputs:
            found = torch.stack([self._read(tensors[name], span) for tensors in sources])
        elif all(name in tensors for tensors in sources):
            full = [tensors[name].detach() for tensors in sources]
            found = torch.stack([tensor.to(self.device, self.dtype) for tensor in full])
        else:
            return None
        if not finite(found):
            i = next(i for i, tensors in enumerate(sources) if not finite(tensors[name]))
            what_failed = f"{what} of expert {i}: tensor {name} holds NaN or Inf"
            raise InputError(what_failed, fix=f"make {what}.safetensors again")
        return found

    def _raise_not_finite(self, name: str) -> None:
        names = self.names or ["the base", *(f"expert {i}" for i in range(len(self.experts)))]
        for source, label in zip([self.base, *self.experts], names, strict=True):
            if name in source and not finite(source[name].reshape(-1)):
                what = f"{label}: tensor {name} holds NaN or Inf"
                raise InputError(what, fix="use another checkpoint of this model")
        what = f"tensor {name}: a difference to the base exceeds {self.dtype}"
        raise NumericalError(what, fix="check the experts")


def spans(numel: int, step: int, full: bool) -> list[slice]:
    """Return the spans of `step` elements that cover [0, numel); one if `full`."""
    step = max(1, numel if full else step)
    return [slice(start, min(start + step, numel)) for start in range(0, numel, step)]


def uniform(keys: Sequence[int], span: slice) -> Tensor:
    """Return a span of each key's stream of random numbers, [K n] float32 multiples of 2^-24.

    Value j lies in step j // 8 of the counter, so any span is reached directly.
    """
    first = span.start // PHILOX_VALUES
    steps = -(-span.stop // PHILOX_VALUES) - first
    skipped = span.start - first * PHILOX_VALUES
    values = torch.empty(len(keys), span.stop - span.start)
    for row, key in zip(values, keys, strict=True):
        words = np.random.Philox(key=key).advance(first).random_raw(steps * 4)
        bits = words.astype("<u8", copy=False).view("<u4")
        upper = np.right_shift(bits, 8, out=bits).view("<i4")
        row.copy_(torch.from_numpy(upper[skipped : skipped + len(row)]))
    return values.mul_(2.0**-24)


@contextlib.contextmanager
def chunked_work() -> Iterator[None]:
    """Prepare torch and the allocator for many small operations.

    Torch must not split them: its idle threads spin. And glibc must not give the memory of each
    chunk back to the system: it keeps what is smaller than the largest block it has seen freed, up
    to 32 MB.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.empty(31 << 20, dtype=torch.uint8)
    try:
        yield
    finally:
        torch.set_num_threads(before)
