"""What a recipe is made of, and how its parts are read from JSON and YAML values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from demerge.errors import UsageError
from demerge.expert import EXPERT, Expert
from demerge.merging.recipe.coefficients import read_coefficients
from demerge.merging.recipe.paths import found, is_remote, stored
from demerge.merging.recipe.rules import Rule, number
from demerge.storage.documents import check_known_keys, typed
from demerge.timesteps import TimestepRange


class MergeFields(TypedDict, total=False):
    """What a merge is asked to do beside base and experts.

    Attributes:
        method: a name of `methods()`, or `path.py:function`.
        weights: one per expert; 1/K each by default.
        options: the method's; for one that needs tensors NAME also {NAME: paths}, else they are looked for beside the experts.
        rules: weights and options for some tensors, the first that matches a tensor wins.
        only: patterns of the tensors to merge; the others stay the base's, bit for bit.
        ranges: the timesteps of each expert, where its record does not tell.
        save_dtype: keep (the base's; its scaled fp8 gets scales that hold the merge), float32, float16 or bfloat16.
        variant: which weights of a folder to read, for example fp16.
        out_rank: write an adapter (LoRA) of this rank instead of a model.
        boundary: where a pipeline with two denoisers passes from one to the other, a share of the timesteps.
        no_base: merge the models alone; the first one named, in the base's place, is an expert, too.
        skip_text_encoder: leave out what a LoRA does to text encoders, which is refused else.
        missing: error, or base to keep the base's where an expert lacks a tensor.
        extra: error, or drop to leave out a tensor that only an expert has.
        components: of pipelines, denoiser to keep the base's other parts, all to merge those that differ, or a list; a part
            that differs is refused by default.
    """

    method: str
    weights: Sequence[float] | None
    options: Mapping[str, Any] | None
    rules: Sequence[Rule | str]
    only: Sequence[str]
    ranges: Sequence[TimestepRange | None] | None
    seed: int
    save_dtype: str
    variant: str | None
    out_rank: int | None
    boundary: float | None
    no_base: bool
    skip_text_encoder: bool
    missing: str
    extra: str
    components: str | None


@dataclass(frozen=True, slots=True)
class Source:
    """An input: its path, the timesteps an expert was trained on, and, once known, the SHA-256 of each file.

    `inputs` are the files a method needs beside the weights: {name: {path: SHA-256, or "" where it is not known}}.
    """

    path: str
    range: TimestepRange | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.isprintable():
            raise UsageError(
                f"{self.path}: its name holds control characters or is not UTF-8, and a recipe names it",
                fix="rename it",
            )

    @property
    def name(self) -> str:
        """The last parts of the path, enough to tell experts apart."""
        parts = [p for p in re.split(r"[/\\]", self.path) if p not in ("", ".", "..")]
        return "/".join(parts[-2:]) or self.path

    def document(self) -> dict[str, Any]:
        """Return the source as JSON values."""
        span = {"range": [self.range.start, self.range.stop]} if self.range else {}
        inputs = (
            {"inputs": {name: dict(files) for name, files in self.inputs.items()}}
            if self.inputs
            else {}
        )
        return {
            "path": self.path,
            **({"files": dict(self.files)} if self.files else {}),
            **span,
            **inputs,
        }

    def stored(self, folder: Path) -> Source:
        """Return the source as a recipe in `folder` writes it."""
        inputs = {
            name: {stored(p, folder): h for p, h in files.items()}
            for name, files in self.inputs.items()
        }
        return replace(self, path=stored(self.path, folder), inputs=inputs)


def expanded(path: str) -> list[str]:
    """Return the experts in a folder as `demerge finetune` leaves it, by their ranges; any other path as it is."""
    folder = Path(path)
    if is_remote(path) or not os.path.isdir(path):
        return [path]
    if any((folder / name).is_file() for name in ("model_index.json", "config.json", EXPERT)):
        return [path]
    inside = sorted(
        (Expert.load(record).range, str(record.parent)) for record in folder.glob(f"*/{EXPERT}")
    )
    return [place for _, place in inside] or [path]


def read_source(entry: Any, folder: Path, where: str, known: Sequence[str]) -> Source:
    """Return the input that a path or a table with the keys `known` describes; paths are relative to `folder`.

    Raises:
        UsageError: where a key is unknown or a value wrong, saying `where`.
    """
    table = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(table, dict) or not isinstance(table.get("path"), str):
        raise UsageError(f"{where} names no path", fix="write PATH or {path: PATH, ...}")
    check_known_keys(table, known, where)
    files = texts(typed(table, "files", dict, where) or {})
    inputs = {
        str(name): {
            found(str(p), folder): str(h)
            for p, h in (given if isinstance(given, dict) else {given: ""}).items()
        }
        for name, given in (typed(table, "inputs", dict, where) or {}).items()
    }
    return Source(found(table["path"], folder), _range(table.get("range"), where), files, inputs)


def _range(value: Any, where: str) -> TimestepRange | None:
    if value is None or isinstance(value, str):
        return None if value is None else TimestepRange.parse(value)
    if isinstance(value, list) and [type(v) for v in value] == [int, int]:
        return TimestepRange(*value)
    raise UsageError(
        f"{where}: range is {value!r}", fix="write [start, stop], for example [0, 250]"
    )


def texts(table: Mapping[Any, Any]) -> dict[str, str]:
    """Return a table with all its keys and values as text."""
    return {str(key): str(value) for key, value in table.items()}


def read_rule(entry: Any, where: str) -> Rule:
    """Return the rule that a text or a table {match, weights, options} describes.

    Raises:
        UsageError: as for `read_source`.
    """
    if isinstance(entry, str):
        return Rule.parse(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("match"), str):
        raise UsageError(
            f"{where}: a rule names no pattern", fix="write {match: mid, weights: [0.2, 0.8]}"
        )
    check_known_keys(entry, ("match", "weights", "options"), f"{where}: rule '{entry['match']}'")
    weights, options = (
        typed(entry, key, kind, where) for key, kind in (("weights", list), ("options", dict))
    )
    return Rule.of(entry["match"], weights, options or {})


def read_weights(
    document: Mapping[str, Any], experts: Sequence[Any], folder: Path, where: str
) -> tuple[list[float] | None, list[Rule]]:
    """Return the weights of the whole model and rules for its parts: of the experts, of a list, or of a file.

    Raises:
        UsageError: as for `read_source`.
    """
    whole = typed(document, "weights", (list, str), where)
    each = [entry["weight"] for entry in experts if isinstance(entry, dict) and "weight" in entry]
    if each and (whole is not None or len(each) != len(experts)):
        raise UsageError(
            f"{where}: weights are given twice or in part",
            fix="give each expert a weight, or one list weights",
        )
    if isinstance(whole, str):
        return read_coefficients(folder / whole)
    try:
        return ([number(weight) for weight in whole or each] if whole or each else None), []
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{where}: weights are not numbers", fix="for example weights: [0.5, 0.5]"
        ) from error
