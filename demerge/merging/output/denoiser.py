"""The denoisers of an output, each a stream of merged chunks that becomes one file: a model's weights, or an adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from demerge.lora import NoBase
from demerge.merging.engine.job import MergedChunk, MergeJob
from demerge.merging.output.lora import AdapterSummary, prefix_of, write_adapter
from demerge.merging.output.storage import Storage
from demerge.merging.output.writer import (
    WEIGHTS_FILE,
    Entry,
    Observe,
    Sink,
    Tally,
    header,
    pieces,
    write,
)
from demerge.merging.recipe.fields import Source
from demerge.merging.recipe.rules import Matched
from demerge.storage.atomic import commit_file, sha256
from demerge.storage.layout import CheckpointLocation

if TYPE_CHECKING:
    from demerge.merging.report.diagnosis import Sums

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
First = Callable[[Sequence["Sums"]], object]


@dataclass(frozen=True, slots=True)
class Written:
    """What is known of weights once they are written.

    Attributes:
        tally: what survived the rounding.
        seen: diagnostics of each chunk, where they were asked for.
        sha256: of the file, empty where it was not asked for.
        adapter: what an adapter holds of the merge.
    """

    tally: Tally
    seen: Sequence[Sums]
    sha256: str
    adapter: AdapterSummary | None = None


class Hashed:
    """A stream that hashes what it passes on; without another stream it only hashes."""

    def __init__(self, stream: Sink | None = None) -> None:
        self._stream, self._digest = stream, hashlib.sha256()

    def write(self, data: Any, /) -> None:
        """Hash and pass on."""
        self._digest.update(data)
        if self._stream is not None:
            self._stream.write(data)

    @property
    def sha256(self) -> str:
        """The SHA-256 of all that was written."""
        return self._digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Metadata:
    """The metadata of a file: `now`, or a draft of the same length until `later`, when all hashes are known."""

    now: Mapping[str, str]
    later: Callable[[], Mapping[str, str]] | None = None

    def final(self) -> Mapping[str, str]:
        """Return it once it is known."""
        return self.later() if self.later else self.now


@dataclass(frozen=True, slots=True)
class Lora:
    """The adapter that is written in place of a model: its rank, and the dtype of its factors."""

    rank: int
    dtype: torch.dtype


@dataclass(frozen=True)
class OutputDenoiser:
    """One denoiser of the output.

    Attributes:
        place: where the base's denoiser lies.
        folder: where its weights go, inside an output folder.
        entries: the tensors to write.
        experts: the sources of its experts, one for each that the merge has.
        taken: what each rule took.
        file: the name of its weights in that folder.
        notes: what of base and experts is left out or kept; see `demerge.merging.inputs.compatibility`.
    """

    job: MergeJob
    place: CheckpointLocation
    folder: Path
    entries: Sequence[Entry]
    experts: Sequence[Source]
    taken: Sequence[Matched] = ()
    lora: Lora | None = None
    notes: Sequence[str] = ()
    file: str = WEIGHTS_FILE

    @property
    def path(self) -> Path:
        """Its file, inside an output folder."""
        return Path(ADAPTER_FILE) if self.lora else self.folder / self.file

    @property
    def ram_bytes(self) -> int:
        """Anonymous memory of the tensors at the peak: for each worker base, deltas and their intermediate values."""
        job = self.job
        largest = max((entry.numel for entry in self.entries), default=0)
        held = largest if job.method.needs_full_tensor else min(largest, job.execution.chunk)
        return (
            job.reader.dtype.itemsize
            * held
            * 4
            * (len(job.experts) + 1)
            * job.execution.num_workers
        )

    @cached_property
    def storage(self) -> Storage:
        """How the entries are stored; the first use may take a pass over the merge."""
        return Storage.of(self.job, {entry.name: entry.dtype for entry in self.entries})

    def parameters(self, names: Sequence[str]) -> int:
        """Count the elements of some tensors."""
        return sum(self.job.base[name].numel() for name in names)

    def survey(self) -> Tally:
        """Run the arithmetic alone; return what survives the rounding."""
        tally = Tally()
        for piece in pieces(self.job, self.entries, self.storage):
            tally.add(piece)
        return tally

    def commit(
        self,
        path: Path,
        metadata: Metadata,
        *,
        diagnosed: bool = False,
        hashed: bool = True,
        first: First | None = None,
    ) -> Written:
        """Write the file, whole or not at all; with `diagnosed`, look at every chunk.

        Args:
            first: called with what was seen, before the file is put in its place.
        """
        if self.lora:
            return self._factored(path, self.lora, metadata.final(), diagnosed, first)
        written: list[Written] = []

        def put(stream: BinaryIO) -> None:
            written.append(
                self._streamed(stream, metadata.now, diagnosed, hashed and metadata.later is None)
            )
            if metadata.later:
                stream.seek(0)
                stream.write(header(self.entries, {**self.storage.metadata, **metadata.later()}))
            if first:
                first(written[0].seen)

        commit_file(path, put)
        return replace(written[0], sha256=sha256(path)) if hashed and metadata.later else written[0]

    def digest(self, metadata: Mapping[str, str]) -> str:
        """Return the SHA-256 of the file that `commit` would write."""
        if not self.lora:
            return self._streamed(Hashed(), metadata).sha256
        with TemporaryDirectory() as folder:
            return self._factored(Path(folder) / ADAPTER_FILE, self.lora, metadata, False).sha256

    def _streamed(
        self,
        stream: Sink,
        metadata: Mapping[str, str],
        diagnosed: bool = False,
        hashed: bool = False,
    ) -> Written:
        sink = Hashed(stream) if hashed else stream
        observe = self._observer() if diagnosed else None
        tally, seen = write(
            sink,
            self.job,
            self.entries,
            self.storage,
            {**self.storage.metadata, **metadata},
            observe,
        )
        return Written(tally, seen, sink.sha256 if isinstance(sink, Hashed) else "")

    def _factored(
        self,
        path: Path,
        lora: Lora,
        metadata: Mapping[str, str],
        diagnosed: bool,
        first: First | None = None,
    ) -> Written:
        """Write the best factors of every tensor's merged delta."""
        tally, seen, observe = Tally(), [], self._observer() if diagnosed else None

        def deltas() -> Iterator[tuple[str, Tensor]]:
            steps = self.job.stream(
                self.job.floating, lambda n, done: (_step(done), observe and observe(n, done))
            )
            for name in self.job.floating:
                delta = torch.empty(self.job.base[name].numel(), dtype=self.job.reader.dtype)
                start = 0
                while start < len(delta):
                    step, found = next(steps)
                    delta[start : (start := start + len(step))] = step
                    seen.extend([] if found is None else [found])
                tally.changed += int(delta.count_nonzero())
                yield name, delta.view(self.job.base[name].shape)
            if first:
                first(seen)

        base = self.job.base
        prefix = (base.prefix if isinstance(base, NoBase) else "") or prefix_of(self.place, base)
        summary = write_adapter(path, deltas(), lora.rank, prefix, metadata, lora.dtype)
        tally.survived = tally.changed
        return Written(tally, seen, sha256(path), summary)

    def _observer(self) -> Observe:
        from demerge.merging.report.diagnosis import observer

        return observer(self.storage, self.job.base)


def _step(done: MergedChunk) -> Tensor:
    return (done.merged - done.block.base.reshape(-1)).cpu()
