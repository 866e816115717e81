"""The inputs of a merge, and how a recipe writes their paths.

    ./x  ../x      relative to the recipe's folder: the output folder, or that of an output file
    ~/x            in the reader's home folder, if path and recipe share no folder below it
    /x             anywhere else
    owner/name     a model on the Hub, or the name of an embedded model

So the same inputs and output, moved together, give the same recipe and the same bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from demerge.errors import InputError, UsageError
from demerge.expert import EXPERT, Expert
from demerge.storage.hub import EMBEDDED, HUB_ID
from demerge.timesteps import TimestepRange

MODEL_FILES = ("model_index.json", "config.json", EXPERT)


@dataclass(frozen=True, slots=True)
class Source:
    """An input: its path, an expert's timesteps, and the SHA-256 of each file once it is known.

    `inputs` are the files that a method needs next to the weights: {name: {path: SHA-256 or ""}}.
    """

    path: str
    range: TimestepRange | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.isprintable():
            what = f"{self.path}: a recipe cannot write a name with control characters or not UTF-8"
            raise UsageError(what, fix="rename it")

    @property
    def name(self) -> str:
        """The last parts of the path, enough to tell experts apart."""
        parts = [p for p in re.split(r"[/\\]", self.path) if p not in ("", ".", "..")]
        return "/".join(parts[-2:]) or self.path

    def document(self) -> dict[str, Any]:
        """Return the source as JSON values."""
        document: dict[str, Any] = {"path": self.path}
        if self.files:
            document["files"] = dict(self.files)
        if self.range:
            document["range"] = [self.range.start, self.range.stop]
        if self.inputs:
            document["inputs"] = {name: dict(files) for name, files in self.inputs.items()}
        return document

    def relative_to(self, folder: Path) -> Source:
        """Return the source as a recipe in `folder` writes it."""
        inputs = {
            name: {write_path(p, folder): sha for p, sha in files.items()}
            for name, files in self.inputs.items()
        }
        return replace(self, path=write_path(self.path, folder), inputs=inputs)

    def check_unchanged(self, now: Source) -> None:
        """Refuse an input that has other hashes now than this record of it."""
        recorded = {f"{now.path}: {name}": sha for name, sha in self.files.items()}
        found = {f"{now.path}: {name}": sha for name, sha in now.files.items()}
        for files in self.inputs.values():
            recorded |= {path: sha for path, sha in files.items() if sha}
        for files in now.inputs.values():
            found |= files
        for file, sha in recorded.items():
            if found.get(file) != sha:
                state = f"now {found[file][:16]}..." if file in found else "and it is not used now"
                what = f"{file} is not what the recipe names: SHA-256 {sha[:16]}..., {state}"
                fix = "restore the file, or remove the hashes (`files`, `inputs`) from the recipe"
                raise InputError(what, fix=fix)


def expand_path(path: str) -> list[str]:
    """Return the experts in a folder of `demerge finetune` by range; else the path itself."""
    folder = Path(path)
    if is_remote(path) or not os.path.isdir(path):
        return [path]
    if any((folder / name).is_file() for name in MODEL_FILES):
        return [path]
    records = folder.glob(f"*/{EXPERT}")
    experts = sorted((Expert.load(record).range, str(record.parent)) for record in records)
    return [expert for _, expert in experts] or [path]


def write_path(path: str, folder: Path) -> str:
    """Return how a recipe in `folder` writes a path."""
    if is_remote(path):
        return path
    target, here, home = Path(os.path.abspath(path)), Path(os.path.abspath(folder)), Path.home()
    common = Path(os.path.commonpath((target, here)))
    if common == Path(common.anchor) or common in home.parents:
        in_home = target.is_relative_to(home)
        return f"~/{target.relative_to(home).as_posix()}" if in_home else target.as_posix()
    relative = Path(os.path.relpath(target, here)).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def read_path(text: str, folder: Path) -> str:
    """Return the path that a recipe in `folder` writes as `text`."""
    if not text.startswith((".", "~", "/")) and is_remote(text, folder):
        return text
    path = Path(text).expanduser() if text.startswith("~") else folder / text
    return os.path.normpath(path)


def is_remote(text: str, folder: Path = Path()) -> bool:
    """Whether a text names an embedded model or a model on the Hub, and no path in `folder`."""
    path = folder / text
    is_hub_id = bool(HUB_ID.fullmatch(text)) and not path.exists() and not path.parent.exists()
    return text in EMBEDDED or is_hub_id
