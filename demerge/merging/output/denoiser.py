"""The denoisers of an output, each a stream of merged chunks that becomes one file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import torch
from torch import Tensor

from demerge.expert import SPEC_RANGE
from demerge.merging.engine.job import MergedChunk, MergeJob
from demerge.merging.output.lora import (
    AdapterSummary,
    Naming,
    rename_deltas,
    write_adapter,
)
from demerge.merging.output.storage import Storage
from demerge.merging.output.writer import (
    WEIGHTS_FILE,
    Entry,
    Observe,
    Sink,
    Tally,
    make_header,
    pieces,
    round_and_count,
    write_stream,
)
from demerge.merging.recipe.rules import RuleMatch
from demerge.merging.recipe.source import Source
from demerge.merging.report.diagnosis import Sums
from demerge.progress import Progress
from demerge.storage.atomic import commit_file, sha256
from demerge.storage.checkpoint import denoiser_of
from demerge.storage.layout import CheckpointLocation
from demerge.timesteps import TimestepRange

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
BeforeCommit = Callable[[Sequence[Sums]], object]


@dataclass(frozen=True, slots=True)
class Written:
    """What is known of weights once they are written.

    Attributes:
        tally: what survived the rounding.
        sums: diagnostics of each chunk, if they were asked for.
        sha256: of the file, empty if it was not asked for.
        adapter: what a LoRA holds of the merge.
    """

    tally: Tally
    sums: Sequence[Sums]
    sha256: str = ""
    adapter: AdapterSummary | None = None


class HashingSink:
    """Bytes that are hashed and go nowhere."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.write = self.digest.update


@dataclass(frozen=True, slots=True)
class Metadata:
    """The metadata of a file: `now`, or a draft of equal length until `later` knows all."""

    now: Mapping[str, str]
    later: Callable[[], Mapping[str, str]] | None = None


@dataclass(frozen=True, slots=True)
class Lora:
    """The LoRA that is written instead of a model.

    Attributes:
        dtype: of its factors.
        file: its name in an output folder.
        range: the timesteps that a pipeline uses it for, if it is one of two.
    """

    rank: int
    dtype: torch.dtype
    naming: Naming
    file: str = ADAPTER_FILE
    range: TimestepRange | None = None

    def describe(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """Return the metadata of its file."""
        own = {SPEC_RANGE: f"{self.range.start},{self.range.stop}"} if self.range else {}
        return {**metadata, **own}


@dataclass(frozen=True)
class OutputDenoiser:
    """One denoiser of the output, or another part.

    Attributes:
        place: where the base's denoiser lies.
        folder: where its weights go, inside an output folder.
        entries: the tensors to write.
        experts: the sources of its experts, one for each that the merge has.
        matches: what each rule took.
        notes: what of base and experts is dropped or kept.
        file: the name of its weights in that folder.
    """

    job: MergeJob
    place: CheckpointLocation
    folder: Path
    entries: Sequence[Entry]
    experts: Sequence[Source]
    matches: Sequence[RuleMatch] = ()
    lora: Lora | None = None
    notes: Sequence[str] = ()
    file: str = WEIGHTS_FILE

    def with_progress(self, progress: Progress) -> OutputDenoiser:
        """Return it with a job that reports to `progress`."""
        execution = replace(self.job.execution, progress=progress)
        return replace(self, job=replace(self.job, execution=execution))

    @property
    def path(self) -> Path:
        """Its file, inside an output folder."""
        return Path(self.lora.file) if self.lora else self.folder / self.file

    @property
    def ram_bytes(self) -> int:
        """Anonymous memory of the tensors at the peak, of all workers."""
        job, execution = self.job, self.job.execution
        largest = max((entry.numel for entry in self.entries), default=0)
        chunk = largest if job.method.needs_full_tensor else min(largest, execution.chunk)
        per_tensor = job.reader.dtype.itemsize * chunk * 4  # with intermediate values
        return per_tensor * (len(job.experts) + 1) * execution.num_workers

    @cached_property
    def storage(self) -> Storage:
        """How the entries are stored; the first use may take a pass over the merge."""
        return Storage.of(self.job, {entry.name: entry.dtype for entry in self.entries})

    def count_parameters(self, names: Sequence[str]) -> int:
        """Count the elements of some tensors."""
        return sum(self.job.base[name].numel() for name in names)

    def measure(self) -> Tally:
        """Run the arithmetic alone; return what survives the rounding."""
        stream = pieces(self.job, self.entries, self.storage)
        return sum((piece.tally for piece in stream), Tally())

    def commit(
        self,
        path: Path,
        metadata: Metadata,
        observe: Observe | None = None,
        *,
        hashed: bool = True,
        before: BeforeCommit | None = None,
    ) -> Written:
        """Write the file, whole or not at all.

        Args:
            observe: looks at every chunk.
            before: called with what was observed, before the file is put in its place.
        """
        if self.lora:
            known = metadata.later() if metadata.later else metadata.now
            return self._commit_lora(path, self.lora, known, observe, before)
        written: list[Written] = []

        def put(stream: BinaryIO) -> None:
            written.append(self._write(stream, metadata.now, observe))
            if metadata.later:
                stream.seek(0)
                stream.write(make_header(self.entries, self._with_storage(metadata.later())))
            if before:
                before(written[0].sums)

        commit_file(path, put)
        return replace(written[0], sha256=sha256(path)) if hashed else written[0]

    def digest(self, metadata: Mapping[str, str]) -> str:
        """Return the SHA-256 of the file that `commit` would write."""
        if self.lora:
            with TemporaryDirectory() as folder:
                path = Path(folder) / ADAPTER_FILE
                return self._commit_lora(path, self.lora, metadata).sha256
        sink = HashingSink()
        self._write(sink, metadata)
        return sink.digest.hexdigest()

    def _with_storage(self, metadata: Mapping[str, str]) -> dict[str, str]:
        return {**self.storage.metadata, **metadata}

    def _write(
        self, sink: Sink, metadata: Mapping[str, str], observe: Observe | None = None
    ) -> Written:
        everything = self._with_storage(metadata)
        return Written(
            *write_stream(sink, self.job, self.entries, self.storage, everything, observe)
        )

    def _commit_lora(
        self,
        path: Path,
        lora: Lora,
        metadata: Mapping[str, str],
        observe: Observe | None = None,
        before: BeforeCommit | None = None,
    ) -> Written:
        """Write the best factors of every tensor's merged delta."""
        changed, job = 0, self.job
        sums: list[Sums] = []

        def finish(name: str, done: MergedChunk) -> tuple[Tensor, Sums | None]:
            delta = (done.merged - done.block.base.reshape(-1)).cpu()
            if observe is None:
                return delta, None
            _, changed, survived = round_and_count(self.storage, job, name, done)
            return delta, observe(name, done, changed, survived)

        def deltas() -> Iterator[tuple[str, Tensor]]:
            nonlocal changed
            for name, chunks in job.stream_tensors(job.floating, finish):
                sums.extend(observed for _, observed in chunks if observed is not None)
                parts = [delta for delta, _ in chunks] or [torch.empty(0)]
                delta = torch.cat(parts).to(job.reader.dtype)
                changed += int(delta.count_nonzero())
                yield name, delta.view(job.base[name].shape)
            if before:
                before(sums)

        shapes = {name: tuple(tensor.shape) for name, tensor in job.base.items()}
        summary = write_adapter(
            path,
            rename_deltas(deltas(), shapes, lora.naming),
            lora.rank,
            lora.naming,
            lora.describe(metadata),
            lora.dtype,
            shapes.keys() - denoiser_of(shapes).keys(),
        )
        return Written(Tally(changed, changed), sums, sha256(path), summary)
