"""The engine: a merge as a stream of chunks, over tensors in memory or on disk alike.

    deltas of a chunk -> statistics (passes over the model or the tensor) -> method -> one rounding

Base and experts are mappings from names to tensors: a state dict, or a `Checkpoint`, which reads
tensors as they are used. Neither the chunk size nor the number of workers changes a bit of the
result: methods are elementwise, random numbers are counted by element, and statistics are summed
over blocks of a fixed size in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from demerge.errors import NumericalError
from demerge.merging.contract import Block, Blocks, Method, call_with
from demerge.merging.engine.reader import CHUNK, Reader, chunked_work
from demerge.merging.engine.validation import (
    Tensors,
    check_same_size,
    holds_deltas,
    name_method_in_errors,
)
from demerge.merging.engine.workers import ALONE, WorkerPool, run
from demerge.progress import Progress, silent
from demerge.storage.checkpoint import finite
from demerge.timesteps import TimestepRange

BATCH = 1 << 26  # elements of each expert between two passes
PARTS = 8  # of a sum, for each process
Value = TypeVar("Value")
Item = tuple[str, slice]  # a span of a tensor


@dataclass(frozen=True, slots=True)
class Execution:
    """How a merge is computed; the result does not depend on it.

    Attributes:
        num_workers: processes that share the arithmetic, if the system can fork.
        chunk: elements per expert that a worker holds at once.
    """

    device: str = "cpu"
    num_workers: int = 1
    progress: Progress = silent
    chunk: int = CHUNK


@dataclass(frozen=True, slots=True)
class Setting:
    """The weights [K] and the options of the method, for a model or for one tensor."""

    weights: Sequence[float]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MergedChunk:
    """A merged chunk [n], unrounded; its block, and where in the tensor it starts."""

    merged: Tensor
    block: Block
    start: int


@dataclass(frozen=True)
class MergeJob:
    """What is merged and how; `stream(names, finish)` gives the result.

    Attributes:
        weights: one coefficient per expert.
        options: all options of the method, resolved.
        inputs: by name, the tensors of each expert that the method needs beside its weights.
        names: what base and experts are called in errors.
        settings: the tensors that have weights and options of their own, all options resolved.
        only: the tensors to merge; the others stay the base's. None for all.
        ranges: the timesteps of each expert, None for one that is not known.
        snr: the signal-to-noise ratio [T] of the base's schedule, if it has one.
    """

    method: Method
    base: Tensors
    experts: Sequence[Tensors]
    weights: Sequence[float]
    options: Mapping[str, Any]
    inputs: Mapping[str, Sequence[Tensors]] = field(default_factory=dict)
    seed: int = 0
    names: Sequence[str] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)
    only: Container[str] | None = None
    ranges: Sequence[TimestepRange | None] = ()
    snr: Tensor | None = None
    execution: Execution = Execution()

    @cached_property
    def floating(self) -> list[str]:
        """The names of the tensors that are merged; the others are copied from the base."""
        names = [name for name, tensor in self.base.items() if tensor.is_floating_point()]
        return [name for name in names if self.only is None or name in self.only]

    @cached_property
    def reader(self) -> Reader:
        """What reads the blocks."""
        device = self.execution.device
        return Reader(
            self.method, self.base, self.experts, self.inputs, self.seed, self.names, device
        )

    def setting(self, name: str | None) -> Setting:
        """Return the weights and options of a tensor; of the model for None."""
        return self.settings.get(name or "") or Setting(self.weights, self.options)

    def stream(
        self, names: Sequence[str], finish: Callable[[str, MergedChunk], Value]
    ) -> Iterator[Value]:
        """Yield finish(name, chunk) for all chunks of the named tensors, in order.

        Worker processes call `finish`.

        Raises:
            InputError: if a tensor holds NaN or Inf.
            NumericalError: if the method turns finite numbers into NaN or Inf.
        """
        with chunked_work():
            filled = [name for name in names if self.base[name].numel()]
            workers = min(self._usable_workers, len(self._items(filled)))
            yield from run(partial(self._program, filled, finish), workers)

    def stream_tensors(
        self, names: Sequence[str], finish: Callable[[str, MergedChunk], Value]
    ) -> Iterator[tuple[str, list[Value]]]:
        """Yield each named tensor with all that `stream` yields for it."""
        chunks, step = self.stream(names, finish), self.execution.chunk
        for name in names:
            yield name, [next(chunks) for _ in self.reader.spans(name, step)]

    # -- the order of the work ---------------------------------------------------------------------

    def _program(
        self, names: Sequence[str], finish: Callable[[str, MergedChunk], Value], pool: WorkerPool
    ) -> Iterator[Value]:
        """Do the work of `stream`, as one of the processes of a pool."""
        if not self._model_statistics and any(self.base[n].numel() for n in self.floating):
            self._model_statistics.update(self._statistics("model", self.floating, pool, {}))
        for batch in self._batches(names, pool):
            supplied = self._prepare_tensors(batch, pool)
            yield from pool.imap(partial(self._finish, supplied, finish), self._items(batch))

    def _items(self, names: Sequence[str]) -> list[Item]:
        step = self.execution.chunk
        return [(name, span) for name in names for span in self.reader.spans(name, step)]

    def _batches(self, names: Sequence[str], pool: WorkerPool) -> Iterator[list[str]]:
        """Group the names, so that a second pass over a batch still finds it in memory.

        A lone process takes one tensor at a time: what is known of many would lie in between the
        memory of the chunks.
        """
        settings = [self.setting(None), *self.settings.values()]
        scopes = {s.scope(each.options) for s in self.method.statistics for each in settings}
        batch: list[str] = []
        size = 0
        for name in names:
            batch.append(name)
            size += self.base[name].numel()
            if "tensor" in scopes and (size >= BATCH or pool.size == 1):
                yield batch
                batch, size = [], 0
        yield batch

    @cached_property
    def _usable_workers(self) -> int:
        """How many processes share the work; one if tensors are on a device a fork cannot use.

        LoRAs are not looked at: their deltas are on the CPU, and looking expands them.
        """
        wanted = self.execution.num_workers
        if wanted == 1 or self.execution.device != "cpu":
            return 1
        models = [self.base, *(expert for expert in self.experts if not holds_deltas(expert))]
        for sources in self.inputs.values():
            models += sources
        on_cpu = all(t.device.type == "cpu" for tensors in models for t in tensors.values())
        return wanted if on_cpu else 1

    def _finish(
        self,
        supplied: Mapping[str, Mapping[str, Any]],
        finish: Callable[[str, MergedChunk], Value],
        item: Item,
    ) -> Value:
        name, span = item
        block = self.block(item)
        merged = self._merge(name, span, block, supplied[name])
        return finish(name, MergedChunk(merged, block, span.start))

    def _merge(self, name: str, span: slice, block: Block, supplied: Mapping[str, Any]) -> Tensor:
        arguments = {**supplied, **block.inputs, "start": block.start}
        with name_method_in_errors(self.method, name):
            merged = call_with(self.method.function, block.base, block.deltas, supplied=arguments)
        check_same_size(self.method, name, block.base, merged)
        merged = self._restore_single_expert(name, span, block, merged).reshape(-1)
        if not finite(merged):
            what = f"method {self.method.name} makes NaN or Inf of finite numbers in tensor {name}"
            raise NumericalError(what, fix="use smaller weights or another method")
        return merged

    def _restore_single_expert(
        self, name: str, span: slice, block: Block, merged: Tensor
    ) -> Tensor:
        """Take the stored value if the result is the base itself or the one expert with a weight.

        theta_0 + (theta_i - theta_0) rounds twice and may miss theta_i by an ulp; w = e_i gives
        expert i to the bit.
        """
        weighted = [i for i, w in enumerate(self.setting(name).weights) if w != 0]
        if len(weighted) != 1:
            return merged
        stored = self.reader.stored(weighted[0], name, span, block.base.reshape(-1))
        is_expert = merged == block.base + block.deltas[weighted[0]]
        return torch.where(is_expert, stored.view(merged.shape), merged)

    # -- what the method is given ------------------------------------------------------------------

    @cached_property
    def _model_statistics(self) -> dict[str, Any]:
        """The statistics of the model, once a program has measured them."""
        return {}

    def _prepare_tensors(self, names: Sequence[str], pool: WorkerPool) -> dict[str, dict[str, Any]]:
        """Return what the method gets for each tensor; the largest first, to balance the work."""
        falling = sorted(names, key=lambda name: -self.base[name].numel())
        found = pool.reduce_and_broadcast(self._tensor_statistics, falling, list)
        pairs = zip(falling, found, strict=True)
        return {name: self._supplied(name, statistics) for name, statistics in pairs}

    def _tensor_statistics(self, name: str) -> dict[str, Any]:
        return self._statistics("tensor", [name], ALONE, self._model_statistics)

    def _statistics(
        self, scope: str, names: Sequence[str], pool: WorkerPool, known: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what is known and the statistics of the scope, over all the named tensors."""
        found, name = dict(known), None if scope == "model" else names[0]
        for statistic in self.method.statistics:
            if statistic.scope(self.setting(name).options) == scope:
                blocks = _JobBlocks(self, names, pool, statistic.name if name is None else None)
                supplied = self._supplied(name, found)
                with name_method_in_errors(self.method, name):
                    found[statistic.name] = call_with(statistic.compute, blocks, supplied=supplied)
        return found

    def _supplied(self, name: str | None, found: Mapping[str, Any]) -> dict[str, Any]:
        supplied = {"weights": self._weights(name), "ranges": self.ranges, "snr": self.snr}
        statistics = {s.name: found.get(s.name) for s in self.method.statistics}
        return {**supplied, **self.setting(name).options, **statistics}

    def _weights(self, name: str | None) -> Tensor:
        """Return the weights of a tensor; one Tensor for all that have the model's."""
        own = self.settings.get(name or "")
        return self._tensor_of(own.weights) if own else self._model_weights

    @cached_property
    def _model_weights(self) -> Tensor:
        return self._tensor_of(self.weights)

    def _tensor_of(self, weights: Sequence[float]) -> Tensor:
        return torch.tensor(list(weights), dtype=self.reader.dtype, device=self.execution.device)

    def block(self, item: Item) -> Block:
        """Read the block of a span of a tensor."""
        name, span = item
        return self.reader.block(name, span, self._weights(name), self._offsets[name])

    @cached_property
    def _offsets(self) -> dict[str, int]:
        sizes = [self.base[name].numel() for name in self.floating]
        return dict(zip(self.floating, accumulate([0, *sizes]), strict=False))


class _JobBlocks(Blocks):
    """The blocks of some tensors, of a fixed size; `text` names them in progress reports."""

    def __init__(
        self, job: MergeJob, names: Sequence[str], pool: WorkerPool, text: str | None
    ) -> None:
        self._job, self._pool, self._text = job, pool, text
        self._items = [(name, span) for name in names for span in job.reader.spans(name, CHUNK)]

    def __iter__(self) -> Iterator[Block]:
        return map(self._job.block, self._items)

    def map(self, function: Callable[[Block], Value], /) -> Iterator[Value]:
        count = len(self._items)
        if self._pool.size == 1:  # a list of all values would lie in between the chunks' memory
            return self._counted(map(function, self), count)
        return iter(
            self._pool.reduce_and_broadcast(
                lambda item: function(self._job.block(item)),
                self._items,
                lambda values: list(self._counted(values, count)),
            )
        )

    def total(self, count: Callable[[Block], Tensor], /) -> Tensor:
        """Return the sum, each process adding up runs of blocks by itself."""
        n, parts = len(self._items), min(len(self._items), PARTS * self._pool.size)
        runs = [self._items[n * i // parts : n * (i + 1) // parts] for i in range(parts)]
        return self._pool.reduce_and_broadcast(
            lambda run: reduce(Tensor.add_, (count(self._job.block(item)) for item in run)),
            runs,
            lambda sums: reduce(Tensor.add_, self._counted(sums, parts)),
        )

    def _counted(self, values: Iterator[Value], total: int) -> Iterator[Value]:
        for done, value in enumerate(values, 1):
            if self._text:
                self._job.execution.progress(done, total, self._text)
            yield value
