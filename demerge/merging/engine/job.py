"""The engine: a merge as a stream of chunks, over tensors in memory or on disk alike.

    deltas of a chunk -> statistics (passes over the model or the tensor) -> method -> one rounding

Base and experts are mappings from names to tensors: a state dict, or a `Checkpoint`, whose tensors are read as they are
used. Neither the size of the chunk nor the number of workers changes a bit of the result: methods are elementwise,
random numbers are counted by element, and statistics are summed over blocks of a fixed size in a fixed order.
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
from demerge.merging.contract import Block, Blocks, Method, called
from demerge.merging.engine.reader import CHUNK, Reader, chunked_work
from demerge.merging.engine.validation import Tensors, blamed, check_same_size, holds_deltas
from demerge.merging.engine.workers import ALONE, WorkerPool, run
from demerge.storage.checkpoint import finite
from demerge.timesteps import TimestepRange

BATCH = 1 << 26  # elements of each expert between two passes
PARTS = 8  # of a sum, for each process
Progress = Callable[[int, int, str], None]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Setting:
    """The weights [K] and the options of the method, for a model or for one tensor."""

    weights: Sequence[float]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MergedChunk:
    """A merged chunk [n] in the arithmetic's dtype, the block [n] it was made of, and where in the tensor it starts."""

    merged: Tensor
    block: Block
    start: int


@dataclass(frozen=True)
class MergeJob:
    """What is merged and how; `stream(names, finish)` gives the result.

    Attributes:
        weights: one coefficient per expert.
        options: all options of the method, settled.
        inputs: by name, the tensors of each expert that the method needs beside its weights.
        names: what base and experts are called in errors.
        chunk: elements per expert held at once by a worker.
        settings: the tensors that have weights and options of their own, all options settled.
        only: the tensors to merge; the others stay the base's. None for all.
        ranges: the timesteps of each expert, where they are known.
        threads: worker processes that share the arithmetic, where the system can fork.
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
        return [
            n
            for n, t in self.base.items()
            if t.is_floating_point() and (self.only is None or n in self.only)
        ]

    @cached_property
    def reader(self) -> Reader:
        """What reads the blocks."""
        return Reader(
            self.method, self.base, self.experts, self.inputs, self.seed, self.names, self.device
        )

    def tensor(self, name: str) -> Iterator[MergedChunk]:
        """Yield the result for one tensor, chunk by chunk."""
        return self.stream([name], lambda name, done: done)

    def stream(
        self, names: Sequence[str], finish: Callable[[str, MergedChunk], Value]
    ) -> Iterator[Value]:
        """Yield finish(name, chunk) for all chunks of the named tensors, in order; worker processes call `finish`.

        Raises:
            InputError: where a tensor holds NaN or Inf.
            NumericalError: where the method makes a number that is not finite of finite ones.
        """
        with chunked_work():
            held = [name for name in names if self.base[name].numel()]
            yield from run(
                partial(self._program, held, finish), min(self._workers, len(self._items(held)))
            )

    def setting(self, name: str | None) -> Setting:
        """Return the weights and options of a tensor; of the model for None."""
        return self.settings.get(name or "") or Setting(self.weights, self.options)

    # -- the order of the work ---------------------------------------------------------------------------------------

    def _program(
        self, names: Sequence[str], finish: Callable[[str, MergedChunk], Value], crew: WorkerPool
    ) -> Iterator[Value]:
        """Do the work of `stream`, as one of a crew."""
        if not self._of_model and any(self.base[n].numel() for n in self.floating):
            self._of_model.update(self._statistics("model", self.floating, crew, {}))
        for batch in self._batches(names, crew):
            supplied = self._prepared(batch, crew)
            yield from crew.ordered(partial(self._finished, supplied, finish), self._items(batch))

    def _items(self, names: Sequence[str]) -> list[tuple[str, slice]]:
        return [(name, span) for name in names for span in self.reader.spans(name, self.chunk)]

    def _batches(self, names: Sequence[str], crew: WorkerPool) -> Iterator[list[str]]:
        """Cut the names so that a second pass over a batch finds it in memory, where there is a first pass.

        A lone process takes them one by one: what is known of many tensors would lie in between the chunks' memory.
        """
        first = any(
            s.scope(self.setting(n).options) == "tensor"
            for s in self.method.statistics
            for n in (None, *self.settings)
        )
        batch, size = [], 0
        for name in names:
            batch.append(name)
            size += self.base[name].numel()
            if first and (size >= BATCH or crew.size == 1):
                yield batch
                batch, size = [], 0
        yield batch

    @cached_property
    def _workers(self) -> int:
        """How many processes share the work; one where tensors are on another device, which a fork cannot use.

        A LoRA is left out of the look: its deltas are on the CPU, and each would be expanded.
        """
        if self.threads == 1:
            return 1
        tuned = [expert for expert in self.experts if not holds_deltas(expert)]
        held = [
            self.base,
            *tuned,
            *(tensors for given in self.inputs.values() for tensors in given),
        ]
        on_cpu = all(t.device.type == "cpu" for tensors in held for t in tensors.values())
        return self.threads if self.device == "cpu" and on_cpu else 1

    def _finished(
        self,
        supplied: Mapping[str, Mapping[str, Any]],
        finish: Callable[[str, MergedChunk], Value],
        item: tuple[str, slice],
    ) -> Value:
        name, span = item
        block = self._block(name, span)
        return finish(
            name, MergedChunk(self._merged(name, span, block, supplied[name]), block, span.start)
        )

    def _merged(self, name: str, span: slice, block: Block, supplied: Mapping[str, Any]) -> Tensor:
        given = {**supplied, **block.inputs, "start": block.start}
        with blamed(self.method, name):
            merged = called(self.method.function, block.base, block.deltas, supplied=given)
        check_same_size(self.method, name, block.base, merged)
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
        stored = self.reader.stored(weighted[0], name, span, block.base.reshape(-1)).view(
            merged.shape
        )
        return torch.where(merged == block.base + block.deltas[weighted[0]], stored, merged)

    # -- what the method is given ------------------------------------------------------------------------------------

    @cached_property
    def _of_model(self) -> dict[str, Any]:
        """The statistics of the model, once a program has measured them."""
        return {}

    def _prepared(self, names: Sequence[str], crew: WorkerPool) -> dict[str, dict[str, Any]]:
        """Return what the method is given for each tensor; the largest first, so that no worker is left with it."""
        falling = sorted(names, key=lambda name: -self.base[name].numel())
        found = crew.agreed(self._of_tensor, falling, list)
        return {
            name: self._supplied(name, statistics)
            for name, statistics in zip(falling, found, strict=True)
        }

    def _of_tensor(self, name: str) -> dict[str, Any]:
        return self._statistics("tensor", [name], ALONE, self._of_model)

    def _statistics(
        self, scope: str, names: Sequence[str], crew: WorkerPool, known: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what is known and the statistics of the scope, over all the named tensors."""
        found, name = dict(known), None if scope == "model" else names[0]
        for statistic in self.method.statistics:
            if statistic.scope(self.setting(name).options) == scope:
                over = _Blocks(self, names, crew, statistic.name if scope == "model" else None)
                with blamed(self.method, name):
                    found[statistic.name] = called(
                        statistic.compute, over, supplied=self._supplied(name, found)
                    )
        return found

    def _supplied(self, name: str | None, found: Mapping[str, Any]) -> dict[str, Any]:
        constants = {
            "weights": self._weights(name),
            "ranges": self.ranges,
            "snr": self.snr,
            **self.setting(name).options,
        }
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


class _Blocks(Blocks):
    """The blocks of some tensors, of a fixed size."""

    def __init__(
        self, merge: MergeJob, names: Sequence[str], crew: WorkerPool, what: str | None
    ) -> None:
        self._merge, self._crew, self._what = merge, crew, what
        self._items = [(name, span) for name in names for span in merge.reader.spans(name, CHUNK)]

    def __iter__(self) -> Iterator[Block]:
        return (self._merge._block(*item) for item in self._items)

    def map(self, function: Callable[[Block], Value], /) -> Iterator[Value]:
        made = self._of_block(function)
        if (
            self._crew.size == 1
        ):  # one by one: values of all blocks would lie in between the chunks' memory
            return self._told(map(made, self._items), len(self._items))
        return iter(self._crew.agreed(made, self._items, self._listed))

    def total(self, count: Callable[[Block], Tensor], /) -> Tensor:
        """Return the sum, each process adding up runs of blocks by itself."""
        n, parts, made = (
            len(self._items),
            min(len(self._items), PARTS * self._crew.size),
            self._of_block(count),
        )
        runs = [self._items[n * i // parts : n * (i + 1) // parts] for i in range(parts)]
        return self._crew.agreed(
            lambda run: _sum(map(made, run)), runs, lambda sums: _sum(self._told(sums, parts))
        )

    def _of_block(self, function: Callable[[Block], Value]) -> Callable[[tuple[str, slice]], Value]:
        return lambda item: function(self._merge._block(*item))

    def _listed(self, values: Iterator[Value]) -> list[Value]:
        return list(self._told(values, len(self._items)))

    def _told(self, values: Iterator[Value], of: int) -> Iterator[Value]:
        for done, value in enumerate(values, 1):
            if self._what:
                self._merge.progress(done, of, self._what)
            yield value


def _sum(values: Iterator[Tensor]) -> Tensor:
    total: Tensor = reduce(Tensor.add_, values)
    return total
