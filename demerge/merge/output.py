"""Writing a merge: safetensors as a stream, alone or inside a copy of the base's pipeline folder."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from demerge.errors import UsageError
from demerge.headers import read_json
from demerge.merge.apply import Merge, rounded
from demerge.places import Place, inside
from demerge.weights import TORCH_NAMES

CODES = {getattr(torch, name): code for code, name in TORCH_NAMES.items()}
ALIGNMENT = 8
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(slots=True)
class Tally:
    """How many entries the merge changes, and how many of those still differ from the base once rounded."""

    changed: int = 0
    survived: int = 0

    def count(self, merged: Tensor, base: Tensor, stored: Tensor) -> None:
        """Add a chunk: merged and base [n] in the arithmetic's dtype, stored [n] as it is written."""
        changed = merged != base
        self.changed += int(changed.count_nonzero())
        if stored.dtype != merged.dtype:
            changed &= stored != base.to(stored.dtype)
        self.survived += int(changed.count_nonzero())

    @property
    def share(self) -> float:
        """The surviving share in [0, 1]; 1 where nothing changed."""
        return self.survived / self.changed if self.changed else 1.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def layout(base: Mapping[str, Tensor], save_dtype: str) -> list[Entry]:
    """Return the tensors of the output: the base's order, wider elements first so that all are aligned.

    Raises:
        UsageError: where `save_dtype` is none of keep, float32, float16, bfloat16.
    """
    dtypes = {"keep": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if save_dtype not in dtypes:
        raise UsageError(f"save dtype '{save_dtype}' is unknown", fix=f"use one of {', '.join(dtypes)}")
    asked = dtypes[save_dtype]
    entries = [Entry(n, (asked or t.dtype) if t.is_floating_point() else t.dtype, tuple(t.shape)) for n, t in base.items()]
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def chunks(job: Merge, entry: Entry, tally: Tally) -> Iterator[Tensor]:
    """Yield the elements of one tensor as they are stored."""
    source = job.base[entry.name]
    if not source.is_floating_point():
        yield source.reshape(-1)
        return
    for merged, base in job.tensor(entry.name):
        stored = rounded(merged, entry.dtype, entry.name)
        tally.count(merged, base, stored)
        yield stored


def write(stream: BinaryIO, job: Merge, entries: Sequence[Entry], metadata: Mapping[str, str], tally: Tally) -> None:
    """Write the merge as one safetensors file, and count what survives the rounding."""
    stream.write(header(entries, metadata))
    for done, entry in enumerate(entries):
        job.progress(done, len(entries), "merge")
        for stored in chunks(job, entry, tally):
            stream.write(stored.contiguous().view(torch.uint8).numpy().data)
    job.progress(len(entries), len(entries), "merge")


def header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Return the header, its length in front, padded so that the data is aligned."""
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for entry in entries:
        offsets = [position, position := position + entry.bytes]
        table[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def kept_files(base: Place) -> list[tuple[Path, Path]]:
    """Return what a folder output copies from the base, as (file, path in the output).

    Of a pipeline: model_index.json and every component it lists; of the denoiser only its config. Nothing else.

    Raises:
        InputError: where a link leads out of the base's folder.
        UsageError: where the base is a file without a config.
    """
    if base.component is None:
        raise UsageError(f"{base.path} is a file without a config", fix="give -o a name that ends in .safetensors")
    root = base.pipeline or base.component
    files = [base.component / "config.json"]
    if base.pipeline is not None:
        index = read_json(base.pipeline / "model_index.json")
        parts = [p for p in sorted(base.pipeline.iterdir()) if p.is_dir() and p.name in index and p != base.component]
        if base.pipeline == base.component:
            files += [f for f in [root / "scheduler_config.json"] if f.is_file()]
        files += [base.pipeline / "model_index.json", *(file for part in parts for file in sorted(part.rglob("*")))]
    return [(inside(root, f), f.relative_to(root)) for f in files if f.is_file()]


def copy_files(files: Sequence[tuple[Path, Path]], folder: Path) -> None:
    """Copy the kept files into a folder."""
    for source, relative in files:
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / relative)


def is_file(out: Path) -> bool:
    """Whether an output is one file."""
    return out.suffix == ".safetensors"
