"""Files of weights: for the whole model, for blocks and for single tensors, one number per expert.

JSON or YAML                              CSV: a head, then rows as rules; `*` is the model
    {"weights": [0.5, 0.5],                   name,expert 0,expert 1
     "tensors": {"conv_in.weight": [0, 1]},   conv_in.weight,0,1
     "blocks": {"down.0": [0.3, 0.7],         down.0,0.3,0.7
                "up": ["0.2..0.4", 0.5]}}     up,0.2..0.4,0.5
                                              *,0.5,0.5

Each name is the pattern of a rule (`demerge.merging.recipe.rules`), and what holds for rules holds
here: the first match wins, a ramp runs over depth, a name that matches nothing is an error. In JSON
and YAML the tensors come before the blocks. `record` says how `demerge coefficients` found the
weights; it is for people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demerge.errors import DemergeError, InputError, UsageError
from demerge.merging.recipe.rules import Rule, read_number
from demerge.storage.documents import check_known_keys, read_document, read_rows, typed

KEYS = ("format", "weights", "tensors", "blocks", "record")
WHOLE = "*"
FileWeights = tuple[list[float] | None, list[Rule]]


def read_weight_file(path: str | Path) -> FileWeights:
    """Return the weights of the model, None if the file has none, and rules for its parts.

    Raises:
        InputError: if the file is missing or holds something else.
    """
    path = Path(path)
    try:
        if path.suffix == ".csv":
            return _parse_rows(read_rows(path))
        return _parse_table(read_document(path))
    except (ValueError, TypeError, UsageError) as error:
        reason = error.what if isinstance(error, DemergeError) else error
        fix = 'for example {"weights": [0.5, 0.5], "blocks": {"mid": [0.3, 0.7]}}'
        raise InputError(f"{path} is not a file of weights: {reason}", fix=fix) from error


def check_order(path: str | Path, experts: Sequence[str]) -> None:
    """Refuse a file that `demerge coefficients` made for the same experts in another order."""
    path = Path(path)
    record = read_document(path).get("record") if path.suffix != ".csv" else None
    try:
        named = [str(expert["path"]) for expert in record["inputs"]["experts"]] if record else []
    except (KeyError, TypeError):
        return
    recorded, now = ([Path(name).resolve() for name in names] for names in (named, experts))
    if recorded != now and sorted(recorded) == sorted(now):
        what = f"{path} has weights for the experts in another order"
        raise UsageError(what, fix=f"give them as {' '.join(named)}")


def _parse_rows(rows: list[list[str]]) -> FileWeights:
    weights: list[float] | None = None
    rules = []
    for name, *numbers in rows:
        if name.strip() != WHOLE:
            rules.append(Rule.of(name.strip(), numbers, {}))
        elif weights is not None:
            raise UsageError(f"more than one row {WHOLE}")
        else:
            weights = [read_number(text) for text in numbers]
    return weights, rules


def _parse_table(table: Mapping[str, Any]) -> FileWeights:
    check_known_keys(table, KEYS, "the table")
    weights = typed(table, "weights", list, "the table")
    parts = [typed(table, key, dict, "the table") or {} for key in ("tensors", "blocks")]
    rules = [Rule.of(name, numbers, {}) for part in parts for name, numbers in part.items()]
    return (None if weights is None else [read_number(value) for value in weights]), rules
