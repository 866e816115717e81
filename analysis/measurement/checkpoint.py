"""The finished parts of a measurement, so that a killed one continues: a folder of one file each.

    conflict.partial/pilot.safetensors  group-0000.safetensors  group-0001.safetensors ...

Each file is committed whole and says which measurement it is a part of. Parts of one measurement
that were made in several places may be put into one folder: the measurement then begins with all.
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
from demerge.provenance import list_differences
from demerge.storage.atomic import commit_bytes
from demerge.storage.safetensors_header import parse_json

UNREADABLE = (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError)


@dataclass(frozen=True, slots=True)
class MeasurementCheckpoint:
    """Parts of the measurement `key` in `folder`; nothing is stored if that is None."""

    folder: Path | None
    key: Mapping[str, Any]

    def check(self) -> None:
        """Check that the folder holds no part of another measurement."""
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder is not None else ():
            with (
                contextlib.suppress(*UNREADABLE),
                safetensors.safe_open(path, framework="pt") as file,
            ):
                self._check_key(file)

    def load(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Return a part [*shape], None if it is missing or damaged."""
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                self._check_key(file)
                values: Tensor = file.get_tensor("values")
        except UNREADABLE:
            return None
        return values if list(values.shape) == list(shape) else None

    def save(self, name: str, values: Tensor) -> None:
        """Commit a part."""
        path = self._path(name)
        if path is not None:
            tensors = {"values": values.detach().cpu().contiguous()}
            metadata = {"demerge": json.dumps(self.key, sort_keys=True)}
            commit_bytes(path, safetensors.torch.save(tensors, metadata))

    def has(self, name: str) -> bool:
        """Return whether there is a file of that part."""
        path = self._path(name)
        return path is not None and path.is_file()

    def count(self, name: str) -> int:
        """Return how many parts have names that begin with `name`."""
        return 0 if self.folder is None else len(list(self.folder.glob(f"{name}*.safetensors")))

    def remove(self) -> None:
        """Remove the folder, once the whole is safe."""
        if self.folder is not None and self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def _check_key(self, file: Any) -> None:
        key = parse_json((file.metadata() or {})["demerge"])
        own = json.loads(json.dumps(self.key))  # a tuple is a list there
        if key != own:
            differences = "; ".join(list_differences(key, own))
            what = f"{self.folder} holds parts of another measurement: {differences}"
            fix = f"finish that one, choose another folder, or remove {self.folder}"
            raise UsageError(what, fix=fix)
