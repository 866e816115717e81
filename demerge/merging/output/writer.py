"""Writing a merge: safetensors as a stream, alone or in a copy of the base's folder."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedWriter
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from demerge.errors import UsageError
from demerge.merging.engine.job import MergedChunk, MergeJob
from demerge.merging.engine.reader import CHUNK
from demerge.merging.output.storage import Squares, Storage
from demerge.merging.report.diagnosis import Sums
from demerge.storage.checkpoint import TORCH_NAMES, Checkpoint
from demerge.storage.layout import CheckpointLocation, inside, plain_names, read_index
from demerge.storage.safetensors_header import header_bytes
from demerge.storage.scaled import Scaled, decoded

CODES = {getattr(torch, name): code for code, name in TORCH_NAMES.items()}
Observe = Callable[[str, MergedChunk, int, int], Sums]  # of a chunk, its changes and survivors
Put = Callable[[str, int, Tensor], object]
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, data: Any, /) -> object:
        """Take some bytes."""


@dataclass(frozen=True, slots=True)
class Tally:
    """How many entries the merge changes, and how many of those survive the rounding.

    Attributes:
        survived: changed entries whose stored value is not the stored value of the base.
        squares: over fp8, sums of squares of merged, merged - base and stored - merged.
    """

    changed: int = 0
    survived: int = 0
    squares: Squares = (0.0, 0.0, 0.0)

    def __add__(self, other: Tally) -> Tally:
        a, b, c = self.squares
        x, y, z = other.squares
        changed, survived = self.changed + other.changed, self.survived + other.survived
        return Tally(changed, survived, (a + x, b + y, c + z))

    @property
    def share(self) -> float:
        """The surviving share in [0, 1]; 1 if nothing changed."""
        return self.survived / self.changed if self.changed else 1.0

    @property
    def rounding(self) -> str:
        """What is lost by storing fp8; empty if nothing is stored in it."""
        merged, moved, error = self.squares
        if not merged:
            return ""
        loss = f"rounding errs by {math.sqrt(error / merged):.2%} of the weights"
        if moved:
            loss += f" and {math.sqrt(error / moved):.1%} of the merged change"
        more = "--save-dtype bfloat16 or float16 keeps more"
        return f"in fp8: {loss}; {more}"


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk of n elements of the output as it is stored; empty if its process wrote it."""

    n: int
    stored: Tensor
    tally: Tally = Tally()
    sums: Sums | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.numel * self.dtype.itemsize


def list_entries(
    base: Mapping[str, Tensor], save_dtype: str, merged: Container[str] = ()
) -> list[Entry]:
    """Return the tensors of the output: the base's order, wider elements first to align all.

    Args:
        save_dtype: of `MergeOptions`. With `keep`, what is merged in float8 without a scale gets
            bfloat16. A float8 dtype is for the tensors that the base stores in float8, or for its
            matrices if it has none. Scaled fp8 stays so with both.
        merged: the tensors that do not stay the base's.
    """
    dtype: torch.dtype | None = None if save_dtype == "keep" else getattr(torch, save_dtype)
    to_float8 = dtype in FLOAT8
    has_float8 = any(tensor.dtype in FLOAT8 for tensor in base.values())
    keeps_scaled = dtype is None or to_float8
    entries = []
    for name, tensor in base.items():
        stored = tensor.dtype
        is_matrix = tensor.ndim > 1 and name.endswith(".weight")
        if isinstance(tensor, Scaled) and keeps_scaled:
            stored = tensor.codes.dtype
        elif dtype is None and stored in FLOAT8 and name in merged:
            stored = torch.bfloat16
        elif dtype is not None and tensor.is_floating_point():
            is_meant = stored in FLOAT8 if has_float8 else is_matrix
            stored = dtype if is_meant or not to_float8 else stored
        entries.append(Entry(name, stored, tuple(tensor.shape)))
    if keeps_scaled and isinstance(base, Checkpoint):
        entries += [Entry(n, t.dtype, tuple(t.shape)) for n, t in base.storage().items()]
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def note_float8(base: Mapping[str, Tensor], entries: Sequence[Entry]) -> list[str]:
    """Return a note if tensors of the base in float8 are stored in a wider dtype."""
    wider = [entry for entry in entries if entry.name in base and entry.dtype == torch.bfloat16]
    count = sum(base[entry.name].dtype in FLOAT8 for entry in wider)
    if not count:
        return []
    what = f"{count} merged tensors in float8 are stored in bfloat16"
    return [f"{what}; --save-dtype float8_e4m3fn rounds them to float8 again"]


def pieces(
    job: MergeJob,
    entries: Sequence[Entry],
    storage: Storage,
    observe: Observe | None = None,
    put: Put | None = None,
) -> Iterator[Piece]:
    """Yield the output, chunk by chunk, in the order of the entries.

    Args:
        observe: called by worker processes; its result stands in the piece.
        put: called with (name, index of the first element, stored chunk [n]) by the process that
            makes it; the piece is then empty.
    """

    def place(name: str, start: int, stored: Tensor) -> Tensor:
        if put is None:
            return stored
        put(name, start, stored)
        return stored.new_empty(0)

    def finish(name: str, done: MergedChunk) -> Piece:
        stored, changed, survived = round_and_count(storage, job, name, done)
        sums = observe(name, done, changed, survived) if observe else None
        tally = Tally(changed, survived, storage.squares(name, stored, done))
        return Piece(len(stored), place(name, done.start, stored), tally, sums)

    wanted, progress = set(job.floating), job.execution.progress
    merged = job.stream([entry.name for entry in entries if entry.name in wanted], finish)
    for done, entry in enumerate(entries):
        progress(done, len(entries), "merge")
        left = entry.numel
        if entry.name in wanted:
            while left:
                piece = next(merged)
                left -= piece.n
                yield piece
            continue
        is_beside = entry.name in storage.beside
        source = storage.beside[entry.name] if is_beside else job.base[entry.name]
        for start in range(0, left, CHUNK):
            stored = storage.round(entry.name, start, source.reshape(-1)[start : start + CHUNK])
            yield Piece(len(stored), place(entry.name, start, stored))
    progress(len(entries), len(entries), "merge")


def round_and_count(
    storage: Storage, job: MergeJob, name: str, done: MergedChunk
) -> tuple[Tensor, int, int]:
    """Return a chunk as it is stored, how many entries the merge changes, and how many survive.

    numpy compares and counts several times faster than torch.
    """
    stored = storage.round(name, done.start, done.merged)
    merged, base = done.merged.cpu(), done.block.base.reshape(-1).cpu()
    is_rounded = storage.dtypes[name] != job.base[name].dtype
    base_stored = storage.round(name, done.start, base) if is_rounded else base
    changed = int(np.count_nonzero(merged.numpy() != base.numpy()))
    one, other = (
        decoded(t) if t.dtype.itemsize == 1 else t.to(base.dtype) for t in (stored, base_stored)
    )
    return stored, changed, int(np.count_nonzero(one.numpy() != other.numpy()))


def write_stream(
    stream: Sink,
    job: MergeJob,
    entries: Sequence[Entry],
    storage: Storage,
    metadata: Mapping[str, str],
    observe: Observe | None = None,
) -> tuple[Tally, list[Sums]]:
    """Write the merge as one safetensors file; return its tally, and what the observer returned.

    If several processes share the work and the stream is a file, each writes its own chunks.
    """
    head = make_header(entries, metadata)
    stream.write(head)
    put = None
    if isinstance(stream, BufferedWriter) and job.execution.num_workers > 1:
        put = _direct_writer(stream, entries, len(head))
    tally, sums = Tally(), []
    for piece in pieces(job, entries, storage, observe, put):
        stream.write(_bytes_of(piece.stored))
        tally += piece.tally
        if piece.sums is not None:
            sums.append(piece.sums)
    return tally, sums


def _direct_writer(stream: BufferedWriter, entries: Sequence[Entry], start: int) -> Put:
    """Return what writes a chunk to its place in a file whose tensors begin at `start`."""
    stream.flush()
    file = stream.fileno()
    offsets = dict(zip((entry.name for entry in entries), _starts(entries), strict=True))

    def put(name: str, index: int, stored: Tensor) -> None:
        offset = start + offsets[name] + index * stored.dtype.itemsize
        data, written = _bytes_of(stored), 0
        while written < len(data):
            written += os.pwrite(file, data[written:], offset + written)

    return put


def _bytes_of(stored: Tensor) -> memoryview:
    data: memoryview = stored.contiguous().view(torch.uint8).numpy().data
    return data


def _starts(entries: Sequence[Entry]) -> list[int]:
    """Return where each tensor begins in the file, counted from the end of its header."""
    return list(accumulate([0, *(entry.bytes for entry in entries)]))[: len(entries)]


def make_header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Return the header, with its length in front, padded so that the data is aligned."""
    table: dict[str, object] = {"__metadata__": metadata}
    for entry, start in zip(entries, _starts(entries), strict=True):
        offsets = [start, start + entry.bytes]
        table[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
    return header_bytes(table)


def list_kept_files(
    base: CheckpointLocation, variant: str | None = None
) -> list[tuple[Path, Path]]:
    """Return what a folder output copies from the base, as (file, path in the output).

    Of a pipeline: model_index.json and every component it lists; of the denoiser only its config.
    Of weights in several variants one is copied, under the plain name that the merged ones have, so
    that the output loads without a variant.

    Raises:
        InputError: if a link leads out of the base's folder.
        UsageError: if the base is a file without a config.
    """
    if base.component is None:
        what = f"{base.path} is a file without a config"
        raise UsageError(what, fix="give -o a name that ends in .safetensors")
    root = base.pipeline or base.component
    files = [base.component / "config.json"]
    if base.pipeline is not None:
        if base.pipeline == base.component:
            files.append(root / "scheduler_config.json")
        files.append(root / "model_index.json")
        index = read_index(root)
        for part in sorted(root.iterdir()):
            if part.is_dir() and part.name in index and part != base.component:
                files += sorted(part.rglob("*"))
    files = [file for file in files if file.is_file()]
    names = {folder: plain_names(folder, variant) for folder in {file.parent for file in files}}
    kept = []
    for file in files:
        source, relative = inside(root, file), file.relative_to(root)
        name = names[file.parent].get(file.name, file.name)
        if name is not None:
            kept.append((source, relative.with_name(name)))
    return kept


def is_file(out: Path) -> bool:
    """Whether an output is one file."""
    return out.suffix == ".safetensors"


def check_not_pickle(out: Path) -> None:
    """Refuse an output that would be taken for a pickle."""
    if out.suffix in PICKLES:
        fix = "give a name that ends in .safetensors, or that of a folder"
        raise UsageError(f"{out} has the name of a pickle", fix=fix)
