"""Writing a merge: safetensors as a stream, alone or inside a copy of the base's pipeline folder."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from demerge.merging.output.storage import Storage
from demerge.storage.checkpoint import TORCH_NAMES, Checkpoint
from demerge.storage.layout import CheckpointLocation, inside, plain_names, read_index
from demerge.storage.safetensors_header import header_bytes
from demerge.storage.scaled import Scaled, decoded

CODES = {getattr(torch, name): code for code, name in TORCH_NAMES.items()}
WIDER = "--save-dtype bfloat16 or float16 keeps more"
Observe = Callable[[str, MergedChunk], Any]
Put = Callable[[str, int, Tensor], object]
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, data: Any, /) -> object:
        """Take some bytes."""


@dataclass(slots=True)
class Tally:
    """How many entries the merge changes, and how many of those still differ from the base once rounded.

    Attributes:
        squares: over the weights in scaled fp8, the sums of squares of merged, merged - base and stored - merged.
    """

    changed: int = 0
    survived: int = 0
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def add(self, piece: Piece | Tally) -> None:
        """Count a piece, or what another tally counted."""
        self.changed += piece.changed
        self.survived += piece.survived
        a, b, c = self.squares
        x, y, z = piece.squares
        self.squares = (a + x, b + y, c + z)

    @property
    def share(self) -> float:
        """The surviving share in [0, 1]; 1 where nothing changed."""
        return self.survived / self.changed if self.changed else 1.0

    @property
    def rounding(self) -> str:
        """What is lost by storing scaled fp8; empty if nothing is stored in it."""
        merged, moved, error = self.squares
        if not merged:
            return ""
        of_delta = f" and {math.sqrt(error / moved):.1%} of the merged change" if moved else ""
        return (
            f"in the base's scaled fp8: rounding errs by {math.sqrt(error / merged):.2%} of the weights{of_delta}; "
            + WIDER
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk of n elements of the output as it is stored, empty where it was put; what survives in it; what was observed."""

    n: int
    stored: Tensor
    changed: int = 0
    survived: int = 0
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    observed: Any = None


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


def layout(base: Mapping[str, Tensor], save_dtype: str) -> list[Entry]:
    """Return the tensors of the output: the base's order, wider elements first so that all are aligned.

    Raises:
        UsageError: where `save_dtype` is none of keep, float32, float16, bfloat16.
    """
    dtypes = {
        "keep": None,
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    if save_dtype not in dtypes:
        raise UsageError(
            f"save dtype '{save_dtype}' is unknown", fix=f"use one of {', '.join(dtypes)}"
        )
    asked = dtypes[save_dtype]
    kept = {n: t.codes.dtype if isinstance(t, Scaled) else t.dtype for n, t in base.items()}
    entries = [
        Entry(n, (asked or kept[n]) if t.is_floating_point() else t.dtype, tuple(t.shape))
        for n, t in base.items()
    ]
    beside = base.storage() if asked is None and isinstance(base, Checkpoint) else {}
    entries += [Entry(n, t.dtype, tuple(t.shape)) for n, t in beside.items()]
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def pieces(
    job: MergeJob,
    entries: Sequence[Entry],
    storage: Storage,
    observe: Observe | None = None,
    put: Put | None = None,
) -> Iterator[Piece]:
    """Yield the output, chunk by chunk, in the order of the entries.

    Args:
        storage: how the entries are stored.
        observe: called with (name, chunk) by worker processes; what it returns stands in the piece.
        put: called with (name, index of the first element, chunk [n] as it is stored) by the process that makes it.
    """

    def placed(name: str, start: int, stored: Tensor) -> Tensor:
        if put is None:
            return stored
        put(name, start, stored)
        return stored.new_empty(0)

    def finish(name: str, done: MergedChunk) -> Piece:
        stored = storage.stored(name, done.start, done.merged)
        seen = observe(name, done) if observe else None
        counts = survivors(stored, done, storage.kept(name, done, job.base[name].dtype))
        squares = storage.squares(name, stored, done)
        return Piece(len(stored), placed(name, done.start, stored), *counts, squares, seen)

    wanted = set(job.floating)
    merged = job.stream([entry.name for entry in entries if entry.name in wanted], finish)
    for done, entry in enumerate(entries):
        job.execution.progress(done, len(entries), "merge")
        source, left = (
            storage.beside[entry.name] if entry.name in storage.beside else job.base[entry.name],
            entry.numel,
        )
        while left and entry.name in wanted:
            piece = next(merged)
            left -= piece.n
            yield piece
        for start in range(0, left, CHUNK):
            stored = storage.stored(entry.name, start, source.reshape(-1)[start : start + CHUNK])
            yield Piece(len(stored), placed(entry.name, start, stored))
    job.execution.progress(len(entries), len(entries), "merge")


def survivors(stored: Tensor, done: MergedChunk, kept: Tensor) -> tuple[int, int]:
    """Count the entries that the merge changes, and those whose stored value is not the one that is stored of the base.

    numpy compares and counts several times faster than torch.
    """
    merged, base = done.merged.cpu(), done.block.base.reshape(-1).cpu()
    changed = int(np.count_nonzero(merged.numpy() != base.numpy()))
    one, other = (decoded(t) if t.dtype.itemsize == 1 else t.to(base.dtype) for t in (stored, kept))
    return changed, int(np.count_nonzero(one.numpy() != other.numpy()))


def write(
    stream: Sink,
    job: MergeJob,
    entries: Sequence[Entry],
    storage: Storage,
    metadata: Mapping[str, str],
    observe: Observe | None = None,
) -> tuple[Tally, list[Any]]:
    """Write the merge as one safetensors file; return what survives the rounding, and what the observer saw.

    Where the work is shared and the stream is a file, each process writes the chunks that it makes.
    """
    head = header(entries, metadata)
    stream.write(head)
    put = (
        _putter(stream, entries, len(head))
        if isinstance(stream, BufferedWriter) and job.execution.num_workers > 1
        else None
    )
    tally, seen = Tally(), []
    for piece in pieces(job, entries, storage, observe, put):
        stream.write(_bytes(piece.stored))
        tally.add(piece)
        if piece.observed is not None:
            seen.append(piece.observed)
    return tally, seen


def _putter(stream: BufferedWriter, entries: Sequence[Entry], start: int) -> Put:
    """Return what writes a chunk to its place in a file whose tensors begin at `start`."""
    stream.flush()
    file = stream.fileno()
    places = {
        e.name: (start + place, e.dtype.itemsize)
        for e, place in zip(entries, starts(entries), strict=True)
    }

    def put(name: str, index: int, stored: Tensor) -> None:
        place, itemsize = places[name]
        data, written = memoryview(_bytes(stored)), 0
        while written < len(data):
            written += os.pwrite(file, data[written:], place + index * itemsize + written)

    return put


def _bytes(stored: Tensor) -> memoryview:
    """Return the bytes of a tensor."""
    data: memoryview = stored.contiguous().view(torch.uint8).numpy().data
    return data


def starts(entries: Sequence[Entry]) -> list[int]:
    """Return where each tensor begins in the file, counted from the end of its header."""
    return list(accumulate([0, *(entry.bytes for entry in entries)]))[: len(entries)]


def header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Return the header, its length in front, padded so that the data is aligned."""
    table: dict[str, object] = {"__metadata__": metadata}
    for entry, start in zip(entries, starts(entries), strict=True):
        offsets = [start, start + entry.bytes]
        table[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
    return header_bytes(table)


def kept_files(base: CheckpointLocation, variant: str | None = None) -> list[tuple[Path, Path]]:
    """Return what a folder output copies from the base, as (file, path in the output).

    Of a pipeline: model_index.json and every component it lists; of the denoiser only its config. Nothing else. Of weights in
    several variants one is copied, under the plain name that the merged ones have: the output loads without a variant.

    Raises:
        InputError: where a link leads out of the base's folder.
        UsageError: where the base is a file without a config.
    """
    if base.component is None:
        raise UsageError(
            f"{base.path} is a file without a config",
            fix="give -o a name that ends in .safetensors",
        )
    root = base.pipeline or base.component
    files = [base.component / "config.json"]
    if base.pipeline is not None:
        index = read_index(base.pipeline)
        parts = [
            p
            for p in sorted(base.pipeline.iterdir())
            if p.is_dir() and p.name in index and p != base.component
        ]
        if base.pipeline == base.component:
            files += [f for f in [root / "scheduler_config.json"] if f.is_file()]
        files += [
            base.pipeline / "model_index.json",
            *(file for part in parts for file in sorted(part.rglob("*"))),
        ]
    kept = [(inside(root, f), f.relative_to(root)) for f in files if f.is_file()]
    names = {
        folder: plain_names(folder, variant)
        for folder in dict.fromkeys(file.parent for file, _ in kept)
    }
    named = [(file, path, names[file.parent].get(file.name, file.name)) for file, path in kept]
    return [(file, path.with_name(name)) for file, path, name in named if name is not None]


def copy_files(files: Sequence[tuple[Path, Path]], folder: Path) -> None:
    """Copy the kept files into a folder."""
    for source, relative in files:
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / relative)


def is_file(out: Path) -> bool:
    """Whether an output is one file."""
    return out.suffix == ".safetensors"


def check_not_pickled(out: Path) -> None:
    """Refuse an output that would be taken for a pickle.

    Raises:
        UsageError: naming it.
    """
    if out.suffix in PICKLES:
        raise UsageError(
            f"{out} has the name of a pickle",
            fix="give a name that ends in .safetensors, or that of a folder",
        )
