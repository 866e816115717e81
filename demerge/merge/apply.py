"""The engine: a merge as a stream of chunks, over tensors in memory or on disk alike.

    tau_i = theta_i - theta_0 in float32 -> statistics (passes over model or tensor) -> method -> one rounding

Base and experts are mappings from names to tensors: a state dict, or a `Checkpoint`, whose tensors are read as they are
used. No more than a chunk of each expert is held in memory; a method that must see whole tensors holds one of each. The
chunk does not change the result: methods are elementwise, random numbers are counted by element, counts are exact and
sums float64. Other arithmetic is float32 (float64 where the base is).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demerge.errors import InputError, NumericalError
from demerge.merge.checks import Tensors, finite, refuse_missing_inputs, refuse_unlike, settle_weights
from demerge.merge.registry import Block, Method, called, find, of
from demerge.randomness import key_of

CHUNK = 1 << 18
PHILOX_VALUES = 8  # 32-bit values per step of the counter
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Merge:
    """What is merged and how; `tensor(name)` gives the result.

    Attributes:
        weights: one coefficient per expert.
        options: all options of the method, settled.
        inputs: by name, the tensors of each expert that the method needs beside its weights.
        names: what base and experts are called in errors.
        chunk: elements per expert held at once.
    """

    method: Method
    base: Tensors
    experts: Sequence[Tensors]
    weights: Sequence[float]
    options: Mapping[str, Any]
    inputs: Mapping[str, Sequence[Tensors]] = field(default_factory=dict)
    seed: int = 0
    names: Sequence[str] = ()
    chunk: int = CHUNK
    progress: Progress = lambda done, total, what: None

    @property
    def floating(self) -> list[str]:
        """The names of the tensors that are merged; the others are equal in all and copied."""
        return [name for name, tensor in self.base.items() if tensor.is_floating_point()]

    def tensor(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the result for a tensor as (merged [n], base [n]) chunks in the arithmetic's dtype.

        Raises:
            NumericalError: where the method makes a number that is not finite of finite ones.
        """
        if self.base[name].numel() == 0:
            return
        supplied = self._supplied(name)
        position = 0
        for block in self.blocks(name):
            merged = called(self.method.function, block.base, block.deltas, supplied=supplied | dict(block.inputs))
            merged = self._at_corner(name, position, block, merged).reshape(-1)
            if not finite(merged):
                raise NumericalError(
                    f"method {self.method.name} makes NaN or Inf of finite numbers in tensor {name}",
                    fix="use smaller weights or another method",
                )
            position += merged.numel()
            yield merged, block.base.reshape(-1)

    def blocks(self, name: str) -> Iterator[Block]:
        """Yield the chunks of one tensor; a whole tensor in its shape where the method needs it so.

        Raises:
            InputError: where a tensor holds NaN or Inf.
        """
        base = self.base[name]
        step = max(1, base.numel() if self.method.whole else self.chunk)
        shape = (-1, *base.shape) if self.method.whole else (len(self.experts), -1)
        for start in range(0, base.numel(), step):
            span = slice(start, min(start + step, base.numel()))
            origin = self._read(base, span)
            deltas = torch.stack([self._read(expert[name], span) for expert in self.experts]).sub_(origin)
            if not finite(deltas):
                self._name_the_culprit(name)
            inputs = {n: torch.stack([self._read(t[name], span) for t in ts]) for n, ts in self.inputs.items()}
            if self.method.draws:
                inputs["uniform"] = torch.stack([self._uniform(i, name, span) for i in range(len(self.experts))])
            yield Block(
                origin.view(base.shape) if self.method.whole else origin,
                deltas.view(shape),
                {n: t.view(shape) for n, t in inputs.items()},
            )

    # -- what the method is given ------------------------------------------------------------------------------------

    @cached_property
    def _model_statistics(self) -> dict[str, Any]:
        return self._statistics("model", lambda what: _Blocks(self, self.floating, what), {})

    def _supplied(self, name: str) -> dict[str, Any]:
        found = self._model_statistics
        found = self._statistics("tensor", lambda what: _Blocks(self, [name], None), found)
        return self._constants | {s.name: found.get(s.name) for s in self.method.statistics}

    @cached_property
    def _constants(self) -> dict[str, Any]:
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in self.base.values()) else torch.float32
        return {"weights": torch.tensor(list(self.weights), dtype=dtype), **self.options}

    def _statistics(self, scope: str, blocks: Callable[[str], _Blocks], known: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(known)
        for statistic in self.method.statistics:
            if statistic.scope(self.options) == scope:
                supplied = self._constants | {s.name: found.get(s.name) for s in self.method.statistics}
                found[statistic.name] = called(statistic.compute, blocks(statistic.name), supplied=supplied)
        return found

    def _read(self, tensor: Tensor, span: slice) -> Tensor:
        dtype = self._constants["weights"].dtype
        return tensor.detach().reshape(-1)[span].to("cpu", dtype)

    def _uniform(self, expert: int, name: str, span: slice) -> Tensor:
        return uniform(key_of(self.seed, self.method.name, expert, name), span.start, span.stop)

    # -- exactness and faults ----------------------------------------------------------------------------------------

    def _at_corner(self, name: str, position: int, block: Block, merged: Tensor) -> Tensor:
        """Give the stored value where the result is the base itself or the one expert that has weight.

        theta_0 + (theta_i - theta_0) rounds twice and may miss theta_i by an ulp; w = e_i gives expert i to the bit.
        """
        weighted = [i for i, w in enumerate(self.weights) if w != 0]
        if len(weighted) > 1:
            return merged
        if not weighted:
            return torch.where(merged == block.base, block.base, merged)
        span = slice(position, position + merged.numel())
        stored = self._read(self.experts[weighted[0]][name], span).view(merged.shape)
        return torch.where(merged == block.base + block.deltas[weighted[0]], stored, merged)

    def _name_the_culprit(self, name: str) -> None:
        names = self.names or ["the base", *(f"expert {i}" for i in range(len(self.experts)))]
        for source, label in zip([self.base, *self.experts], names, strict=True):
            if not finite(source[name].reshape(-1)):
                raise InputError(f"{label}: tensor {name} holds NaN or Inf", fix="use another checkpoint of this model")
        raise NumericalError(f"tensor {name}: a difference to the base exceeds float32", fix="check the experts")


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The blocks of some tensors; each iteration is one pass, reported under `what` where that is given."""

    merge: Merge
    names: Sequence[str]
    what: str | None

    def __iter__(self) -> Iterator[Block]:
        for done, name in enumerate(self.names):
            if self.what:
                self.merge.progress(done, len(self.names), self.what)
            yield from self.merge.blocks(name)


def merge_tensors(
    base: Tensors,
    experts: Sequence[Tensors],
    method: str | Method | Callable[..., Tensor] = "task_arithmetic",
    *,
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Sequence[Tensors]] | None = None,
    seed: int = 0,
    chunk: int = CHUNK,
) -> dict[str, Tensor]:
    """Merge state dicts in memory; the result has the base's names, shapes and dtypes.

    Args:
        method: a name, `path.py:function`, or the function.
        weights: one per expert; 1/K each by default.
        inputs: for example {"fisher": [one mapping per expert]}.

    Raises:
        UsageError: where method, options or weights are wrong.
        InputError: where the experts do not fit the base.
    """
    chosen = find(method) if isinstance(method, str) else method if isinstance(method, Method) else of(method)
    settled, given = settle_weights(weights, len(experts)), inputs or {}
    refuse_unlike(base, experts, ["the base", *(f"expert {i}" for i in range(len(experts)))])
    refuse_missing_inputs(chosen, base, given, len(experts))
    job = Merge(chosen, base, experts, settled, chosen.settle(options or {}), given, seed, chunk=chunk)
    return {name: _assemble(job, name) for name in base}


def _assemble(job: Merge, name: str) -> Tensor:
    base = job.base[name]
    if not base.is_floating_point():
        return base.clone()
    chunks = [rounded(chunk, base.dtype, name) for chunk, _ in job.tensor(name)]
    return torch.cat(chunks).view(base.shape) if chunks else base.clone()


def rounded(chunk: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Round a chunk to the dtype it is stored in.

    Raises:
        NumericalError: where a value is too large for it.
    """
    stored = chunk.to(dtype)
    if stored.dtype != chunk.dtype and not finite(stored):
        raise NumericalError(f"tensor {name} does not fit {dtype}", fix="use --save-dtype bfloat16 or float32")
    return stored


def uniform(key: int, start: int, stop: int) -> Tensor:
    """Return the random numbers start..stop of a key's stream, [stop - start] float32 in [0, 1), multiples of 2^-24.

    Value j lies in step j // 8 of the counter, so any span is reached without drawing what comes before it.
    """
    first = start // PHILOX_VALUES
    steps = -(-stop // PHILOX_VALUES) - first
    bits = np.random.Philox(key=key).advance(first).random_raw(steps * 4).astype("<u8", copy=False).view("<u4")
    values = torch.from_numpy((bits >> 8).astype(np.float32)) * 2.0**-24
    return values[start - first * PHILOX_VALUES :][: stop - start]
