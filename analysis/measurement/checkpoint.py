"""What is done of a measurement, so that a killed one continues: a folder with one file per finished part.

    conflict.partial/pilot.safetensors  group-0000.safetensors  group-0001.safetensors ...

Each file is committed whole and says what it is a part of. Parts of the same measurement that were made in several places
may be put into one folder: the measurement then begins with all of them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from demerge.errors import UsageError
from demerge.storage.atomic import commit_bytes
from demerge.storage.safetensors_header import parse_json

UNREADABLE = (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError)


@dataclass(frozen=True, slots=True)
class MeasurementCheckpoint:
    """Parts of the measurement `key` in `folder`; nothing is kept where that is None."""

    folder: Path | None
    key: Mapping[str, Any]

    def check(self) -> None:
        """Refuse a folder that holds parts of another measurement, before any work is done.

        Raises:
            UsageError: saying how the measurements differ.
        """
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder is not None else ():
            with (
                contextlib.suppress(*UNREADABLE),
                safetensors.safe_open(path, framework="pt") as file,
            ):
                self._check_same_base(parse_json((file.metadata() or {})["demerge"]))

    def load(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Return a part [*shape], or None where it is not there or damaged, and is to be made again.

        Raises:
            UsageError: where the part is one of another measurement.
        """
        if self.folder is None or not self.has(name):
            return None
        try:
            with safetensors.safe_open(self._path(self.folder, name), framework="pt") as file:
                there, values = (
                    parse_json((file.metadata() or {})["demerge"]),
                    file.get_tensor("values"),
                )
        except UNREADABLE:
            return None
        self._check_same_base(there)
        return values if list(values.shape) == list(shape) else None

    def save(self, name: str, values: Tensor) -> None:
        """Commit a part."""
        if self.folder is not None:
            tensors = {"values": values.detach().cpu().contiguous()}
            data = safetensors.torch.save(
                tensors, {"demerge": json.dumps(self.key, sort_keys=True)}
            )
            commit_bytes(self._path(self.folder, name), data)

    def has(self, name: str) -> bool:
        """Whether there is a file of that part."""
        return self.folder is not None and self._path(self.folder, name).is_file()

    def count(self, name: str) -> int:
        """Return how many parts there are whose names begin so."""
        return 0 if self.folder is None else len(list(self.folder.glob(f"{name}*.safetensors")))

    def sweep(self) -> None:
        """Remove the folder, once the whole is safe."""
        if self.folder is not None and self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _check_same_base(self, there: Any) -> None:
        if there != self.key:
            raise UsageError(
                f"{self.folder} holds parts of another measurement{_differences(there, self.key)}",
                fix=f"finish that one, choose another folder, or remove {self.folder}",
            )

    def _path(self, folder: Path, name: str) -> Path:
        return folder / f"{name}.safetensors"


def _differences(there: Any, asked: Mapping[str, Any]) -> str:
    if not isinstance(there, dict):
        return ""
    names = [name for name in asked if there.get(name) != asked[name]]
    return ": " + "; ".join(
        f"{name} {str(there.get(name))[:60]} there, {str(asked[name])[:60]} asked" for name in names
    )
