"""Checkpoints of a training run: safetensors and a manifest, whole or absent, newest first.

    state/step-00000500/  tensors.safetensors
                          manifest.json {step, skipped, parts, log_bytes, optimizer, inputs,
                                         options, sha256}

Random numbers are functions of (seed, purpose, step, sample). So the parameters, their averages,
the optimizer's state, the scale of the loss and the step are the whole state. A resumed run ends
bit-identical to an uninterrupted one on the same machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
from pydantic import Field
from torch import Tensor

from demerge.errors import InputError
from demerge.storage.atomic import commit_bytes, commit_dir, commit_json, sha256
from demerge.storage.schema import Count, Record, Settings, Table, read_record

Number = bool | int | float


class OptimizerValues(Record):
    """What an optimizer keeps besides tensors: numbers of its groups, and of single parameters."""

    groups: tuple[dict[str, Number], ...] = ()
    numbers: dict[str, dict[str, Number]] = Field(default_factory=dict)


class Manifest(Record):
    """The record of a checkpoint."""

    step: Count
    skipped: Count
    parts: Annotated[int, Field(ge=1)] = 1
    log_bytes: Count
    optimizer: OptimizerValues = OptimizerValues()
    options: Settings
    inputs: Table
    sha256: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A whole training state on disk, and its record."""

    path: Path
    record: Manifest

    def tensors(self) -> dict[str, Tensor]:
        """Return the flat tensors by name."""
        return safetensors.torch.load_file(self.path / "tensors.safetensors")


def disk_bytes(parameters: int, experts: int, trained: int, checkpoints: int = 1) -> int:
    """Return the bytes on disk of the experts and of the checkpoints, in float32.

    A checkpoint holds the trained parameters, their average and two moments. One more than are kept
    exists while it is written.
    """
    return 4 * (parameters * experts + trained * (checkpoints + 1) * 4)


def save_state(
    folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any], limit: int = 1
) -> None:
    """Commit `step-N` under `folder`, then delete the older ones until `limit` are left."""
    path = folder / f"step-{record['step']:08d}"
    with commit_dir(path, replace=True) as temporary:
        flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        file = commit_bytes(temporary / "tensors.safetensors", safetensors.torch.save(flat))
        commit_json(temporary / "manifest.json", {**record, "sha256": sha256(file)})
    for old in sorted(folder.glob("step-*"))[:-limit]:
        shutil.rmtree(old)


def newest_state(folder: Path) -> Snapshot | None:
    """Return the newest checkpoint that is whole, or None."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            record = read_record(path / "manifest.json", Manifest, fix=f"remove {path}")
            if sha256(path / "tensors.safetensors") == record.sha256:
                return Snapshot(path, record)
        except (OSError, InputError):
            continue
    return None
