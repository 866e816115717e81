"""A recipe from JSON or YAML values, read without trust: known keys with known types."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demerge.errors import UsageError
from demerge.merging.recipe.rules import Rule, read_number
from demerge.merging.recipe.source import Source, expand_path, read_path
from demerge.merging.recipe.weight_files import read_weight_file
from demerge.storage.documents import check_known_keys, typed
from demerge.timesteps import TimestepRange

FORMAT = "demerge.recipe/1"
KINDS: Mapping[str, Any] = {
    "format": str, "base": (str, dict), "experts": list, "method": str, "options": dict,
    "weights": (list, str), "rules": list, "only": list, "seed": int, "save_dtype": str,
    "variant": str, "out_rank": int, "lora_rank": int, "boundary": (int, float), "versions": dict,
    "output": dict, "skip_text_encoder": bool, "missing": str, "extra": str, "components": str,
    "no_base": bool, "lora_format": str,
}  # fmt: skip
MODELS = ("format", "base", "experts", "weights", "rules")  # keys with a reader of their own
EXPERT = ("path", "weight", "range", "files", "inputs")


def read_fields(document: Any, folder: Path, where: str) -> dict[str, Any]:
    """Return the fields of the recipe that a file of `folder` describes; `where` names the file.

    Raises:
        UsageError: if a key is unknown or a value wrong.
    """
    if not isinstance(document, dict) or not document.get("experts"):
        fix = "write base: PATH and experts: [PATH, ...]"
        raise UsageError(f"{where} names no base and experts", fix=fix)
    if not document.get("base") and document.get("no_base") is not True:
        fix = "write base: PATH, or no_base: true to merge the experts alone"
        raise UsageError(f"{where} names no base", fix=fix)
    check_known_keys(document, KINDS, where)
    if str(document.get("format", FORMAT)) != FORMAT:
        fix = f"this version reads {FORMAT}"
        raise UsageError(f"{where} has the format {document['format']}", fix=fix)
    names = [key for key in document if key not in MODELS]
    values = {key: typed(document, key, KINDS[key], where) for key in names}
    if ".py:" in (values.get("method") or ""):  # a recipe from anywhere must not name code to run
        fix = f"give it yourself: --method {values['method']}"
        raise UsageError(f"{where} names the file of a method", fix=fix)
    values.setdefault("lora_rank", values.pop("out_rank", None))
    values |= {key: as_texts(values[key]) for key in ("versions", "output") if values.get(key)}
    values["only"] = [str(pattern) for pattern in values.get("only") or ()]
    values["options"] = dict(values.get("options") or {})
    for name, value in values["options"].items():
        if isinstance(value, list):
            values["options"][name] = [read_path(str(path), folder) for path in value]
    return {
        **{key: value for key, value in values.items() if value is not None},
        **_read_models(document, folder, where),
    }


def _read_models(document: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Return base, experts, weights and rules."""
    entries: list[Any] = []
    for entry in typed(document, "experts", list, where):
        path = read_path(entry, folder) if isinstance(entry, str) else ""
        inside = expand_path(path) if path else []
        entries += [entry] if inside in ([], [path]) else map(os.path.abspath, inside)
    weights, weight_rules = _read_weights(document, entries, folder, where)
    experts = [
        read_source(entry, folder, f"{where}: expert {i}", EXPERT)
        for i, entry in enumerate(entries)
    ]
    base = Source(experts[0].path)
    if document.get("base"):
        base = read_source(document["base"], folder, f"{where}: base", ("path", "files"))
    if document.get("no_base") and base.path != experts[0].path:
        experts = [base, *experts]
    rules = [_read_rule(entry, where) for entry in typed(document, "rules", list, where) or ()]
    return {"base": base, "experts": experts, "weights": weights, "rules": [*rules, *weight_rules]}


def read_source(entry: Any, folder: Path, where: str, known: Sequence[str]) -> Source:
    """Return the input that a path or a table with the keys `known` describes.

    Raises:
        UsageError: if a key is unknown or a value wrong.
    """
    table = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(table, dict) or not isinstance(table.get("path"), str):
        raise UsageError(f"{where} names no path", fix="write PATH or {path: PATH, ...}")
    check_known_keys(table, known, where)
    inputs: dict[str, dict[str, str]] = {}
    for name, value in (typed(table, "inputs", dict, where) or {}).items():
        files = value if isinstance(value, dict) else {value: ""}
        inputs[str(name)] = {read_path(str(p), folder): str(sha) for p, sha in files.items()}
    files = as_texts(typed(table, "files", dict, where) or {})
    return Source(
        read_path(table["path"], folder), _read_range(table.get("range"), where), files, inputs
    )


def as_texts(table: Mapping[Any, Any]) -> dict[str, str]:
    """Return a table with all its keys and values as text."""
    return {str(key): str(value) for key, value in table.items()}


def _read_range(value: Any, where: str) -> TimestepRange | None:
    if value is None or isinstance(value, str):
        return None if value is None else TimestepRange.parse(value)
    if isinstance(value, list) and [type(v) for v in value] == [int, int]:
        return TimestepRange(*value)
    fix = "write [start, stop], for example [0, 250]"
    raise UsageError(f"{where}: range is {value!r}", fix=fix)


def _read_rule(entry: Any, where: str) -> Rule:
    """Return the rule of a text, or of a table {match, weights, options}."""
    if isinstance(entry, str):
        return Rule.parse(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("match"), str):
        fix = "write {match: mid, weights: [0.2, 0.8]}"
        raise UsageError(f"{where}: a rule names no pattern", fix=fix)
    check_known_keys(entry, ("match", "weights", "options"), f"{where}: rule '{entry['match']}'")
    weights = typed(entry, "weights", list, where)
    return Rule.of(entry["match"], weights, typed(entry, "options", dict, where) or {})


def _read_weights(
    document: Mapping[str, Any], experts: Sequence[Any], folder: Path, where: str
) -> tuple[list[float] | None, list[Rule]]:
    """Return the weights of the model and rules: of the experts, of a list, or of a file."""
    whole = typed(document, "weights", (list, str), where)
    each = [entry["weight"] for entry in experts if isinstance(entry, dict) and "weight" in entry]
    if each and (whole is not None or len(each) != len(experts)):
        fix = "give each expert a weight, or one list weights"
        raise UsageError(f"{where}: weights are given twice or in part", fix=fix)
    if isinstance(whole, str):
        return read_weight_file(folder / whole)
    try:
        return [read_number(weight) for weight in whole or each] or None, []
    except (TypeError, ValueError) as error:
        fix = "for example weights: [0.5, 0.5]"
        raise UsageError(f"{where}: weights are not numbers", fix=fix) from error
