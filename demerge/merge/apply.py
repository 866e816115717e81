"""The engine: a merge as a stream of chunks, over tensors in memory or on disk alike.

    deltas of a chunk -> statistics (passes over the model or the tensor) -> method -> one rounding

Base and experts are mappings from names to tensors: a state dict, or a `Checkpoint`, whose tensors are read as they are
used. Neither the size of the chunk nor the number of threads changes a bit of the result: methods are elementwise,
random numbers are counted by element, and statistics are summed over blocks of a fixed size in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

from demerge.errors import NumericalError
from demerge.merge.checks import Tensors, blamed, refuse_other_size
from demerge.merge.contract import Block, Method, called
from demerge.merge.stream import CHUNK, Reader, chunked_work, ordered
from demerge.timesteps import TimestepRange
from demerge.weights import finite

Progress = Callable[[int, int, str], None]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Setting:
    """The weights [K] and the options of the method, for a model or for one tensor."""

    weights: Sequence[float]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Done:
    """A merged chunk [n] in the arithmetic's dtype, and the block [n] it was made of."""

    merged: Tensor
    block: Block


@dataclass(frozen=True)
class Merge:
    """What is merged and how; `stream(names, finish)` gives the result.

    Attributes:
        weights: one coefficient per expert.
        options: all options of the method, settled.
        inputs: by name, the tensors of each expert that the method needs beside its weights.
        names: what base and experts are called in errors.
        chunk: elements per expert held at once by a thread.
        settings: the tensors that have weights and options of their own, all options settled.
        only: the tensors to merge; the others stay the base's. None for all.
        ranges: the timesteps of each expert, where they are known.
        snr: the signal-to-noise ratio at each timestep [T] of the base's schedule, where it has one.
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
    settings: Mapping[str, Setting] = field(default_factory=dict)
    only: Container[str] | None = None
    ranges: Sequence[TimestepRange | None] = ()
    snr: Tensor | None = None
    device: str = "cpu"
    threads: int = 1

    @cached_property
    def floating(self) -> list[str]:
        """The names of the tensors that are merged; the others are copied from the base."""
        return [n for n, t in self.base.items() if t.is_floating_point() and (self.only is None or n in self.only)]

    @cached_property
    def reader(self) -> Reader:
        """What reads the blocks."""
        return Reader(self.method, self.base, self.experts, self.inputs, self.seed, self.names, self.device)

    def tensor(self, name: str) -> Iterator[Done]:
        """Yield the result for one tensor, chunk by chunk."""
        return self.stream([name], lambda name, done: done)

    def stream(self, names: Sequence[str], finish: Callable[[str, Done], Value]) -> Iterator[Value]:
        """Yield finish(name, chunk) for all chunks of the named tensors, in order; worker threads call `finish`.

        Raises:
            InputError: where a tensor holds NaN or Inf.
            NumericalError: where the method makes a number that is not finite of finite ones.
        """
        with chunked_work():
            _ = self._model_statistics
            for value in ordered(lambda task: task(), self._tasks(names, finish), self.threads):
                if value is not None:
                    yield value

    def setting(self, name: str | None) -> Setting:
        """Return the weights and options of a tensor; of the model for None."""
        return self.settings.get(name or "") or Setting(self.weights, self.options)

    # -- the order of the work ---------------------------------------------------------------------------------------

    def _tasks(self, names: Sequence[str], finish: Callable[[str, Done], Value]) -> Iterator[Callable[[], Value | None]]:
        """Yield the work in order; the statistics of a tensor come one tensor early, so that threads need not wait."""
        prepared = [_Prepared(self, name) for name in names if self.base[name].numel()]
        for i, current in enumerate(prepared):
            for early in prepared[i : i + 2]:
                yield early.prepare
            for span in self.reader.spans(current.name, self.chunk):
                yield partial(self._finished, current, span, finish)
            prepared[i] = _Prepared(self, current.name)  # lets go of its block

    def _finished(self, prepared: _Prepared, span: slice, finish: Callable[[str, Done], Value]) -> Value:
        supplied, block = prepared.get()
        if block is None or block.base.numel() != span.stop - span.start:
            block = self._block(prepared.name, span)
        return finish(prepared.name, Done(self._merged(prepared.name, span, block, supplied), block))

    def _merged(self, name: str, span: slice, block: Block, supplied: Mapping[str, Any]) -> Tensor:
        given = {**supplied, **block.inputs, "start": block.start}
        with blamed(self.method, name):
            merged = called(self.method.function, block.base, block.deltas, supplied=given)
        refuse_other_size(self.method, name, block.base, merged)
        merged = self._at_corner(name, span, block, merged).reshape(-1)
        if not finite(merged):
            raise NumericalError(
                f"method {self.method.name} makes NaN or Inf of finite numbers in tensor {name}",
                fix="use smaller weights or another method",
            )
        return merged

    def _at_corner(self, name: str, span: slice, block: Block, merged: Tensor) -> Tensor:
        """Give the stored value where the result is the base itself or the one expert that has weight.

        theta_0 + (theta_i - theta_0) rounds twice and may miss theta_i by an ulp; w = e_i gives expert i to the bit.
        """
        weighted = [i for i, w in enumerate(self.setting(name).weights) if w != 0]
        if len(weighted) != 1:
            return merged
        stored = self.reader.stored(weighted[0], name, span, block.base.reshape(-1)).view(merged.shape)
        return torch.where(merged == block.base + block.deltas[weighted[0]], stored, merged)

    # -- what the method is given ------------------------------------------------------------------------------------

    @cached_property
    def _model_statistics(self) -> dict[str, Any]:
        return self._statistics("model", None, {}) if any(self.base[n].numel() for n in self.floating) else {}

    def _prepared(self, name: str) -> tuple[dict[str, Any], Block | None]:
        """Return what the method is given for a tensor, and its block where there is but one."""
        blocks = _Blocks(self, [name], 1)
        found = self._statistics("tensor", blocks, self._model_statistics)
        return self._supplied(name, found), blocks.kept

    def _statistics(self, scope: str, blocks: _Blocks | None, known: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(known)
        for statistic in self.method.statistics:
            name = blocks.names[0] if blocks else None
            if statistic.scope(self.setting(name).options) == scope:
                over = blocks or _Blocks(self, self.floating, self.threads, statistic.name)
                with blamed(self.method, name):
                    found[statistic.name] = called(statistic.compute, over, supplied=self._supplied(name, found))
        return found

    def _supplied(self, name: str | None, found: Mapping[str, Any]) -> dict[str, Any]:
        constants = {"weights": self._weights(name), "ranges": self.ranges, "snr": self.snr, **self.setting(name).options}
        return constants | {s.name: found.get(s.name) for s in self.method.statistics}

    def _weights(self, name: str | None) -> Tensor:
        """Return the weights of a tensor; one Tensor for all that have the model's."""
        own = self.settings.get(name or "")
        return self._own_weights(own.weights) if own else self._model_weights

    @cached_property
    def _model_weights(self) -> Tensor:
        return self._own_weights(self.weights)

    def _own_weights(self, weights: Sequence[float]) -> Tensor:
        return torch.tensor(list(weights), dtype=self.reader.dtype, device=self.device)

    def _block(self, name: str, span: slice) -> Block:
        return self.reader.block(name, span, self._weights(name), self._offsets[name])

    @cached_property
    def _offsets(self) -> dict[str, int]:
        sizes = [self.base[name].numel() for name in self.floating]
        return dict(zip(self.floating, accumulate([0, *sizes]), strict=False))


class _Prepared:
    """What the method is given for one tensor, computed once, by the first thread that asks."""

    def __init__(self, merge: Merge, name: str) -> None:
        self.name = name
        self._merge = merge
        self._lock = Lock()
        self._value: tuple[dict[str, Any], Block | None] | None = None

    def get(self) -> tuple[dict[str, Any], Block | None]:
        with self._lock:
            if self._value is None:
                self._value = self._merge._prepared(self.name)
            return self._value

    def prepare(self) -> None:
        self.get()


class _Blocks:
    """The blocks of some tensors, of a fixed size; a tensor of one block is read once for all passes over it alone."""

    def __init__(self, merge: Merge, names: Sequence[str], threads: int, what: str | None = None) -> None:
        self.names = names
        self.kept: Block | None = None
        self._merge, self._threads, self._what = merge, threads, what

    def __iter__(self) -> Iterator[Block]:
        return self.map(lambda block: block)

    def map(self, function: Callable[[Block], Value], /) -> Iterator[Value]:
        return ordered(lambda item: function(self._block(*item)), self._items(), self._threads)

    def _items(self) -> Iterator[tuple[str, slice]]:
        for done, name in enumerate(self.names):
            if self._what:
                self._merge.progress(done, len(self.names), self._what)
            for span in self._merge.reader.spans(name, CHUNK):
                yield name, span

    def _block(self, name: str, span: slice) -> Block:
        alone = len(self.names) == 1 and span.stop - span.start == self._merge.base[name].numel()
        if not alone:
            return self._merge._block(name, span)
        if self.kept is None:
            self.kept = self._merge._block(name, span)
        return self.kept
