"""Files of weights: for the whole model, for blocks and for single tensors, one number per expert everywhere.

JSON or YAML                                        CSV: a head, then rows in the order of rules, `*` being the whole model
    {"weights": [0.5, 0.5],                             name,expert 0,expert 1
     "tensors": {"conv_in.weight": [0, 1]},             conv_in.weight,0,1
     "blocks": {"down.0": [0.3, 0.7],                   down.0,0.3,0.7
                "up": ["0.2..0.4", 0.5]}}               up,0.2..0.4,0.5
                                                        *,0.5,0.5

Each name is the pattern of a rule (`demerge.merging.recipe.rules`), with all that holds for rules:
the first that matches wins, a ramp runs over depth, and a name that matches nothing is an error. In
JSON and YAML the tensors come before the blocks; what stands under `record` (how `demerge
coefficients` found the weights) is for people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demerge.errors import DemergeError, InputError, UsageError
from demerge.merging.recipe.rules import Rule, number
from demerge.storage.documents import check_known_keys, read_document, read_rows, typed

KEYS = ("format", "weights", "tensors", "blocks", "record")
ENDS = (".json", ".yaml", ".yml", ".csv")
WHOLE = "*"


def is_coefficients(text: str) -> bool:
    """Whether a text is the name of a file of weights."""
    return text.endswith(ENDS)


def read_coefficients(path: Path) -> tuple[list[float] | None, list[Rule]]:
    """Return the weights of the whole model, None where the file has none, and the rules for its parts.

    Raises:
        InputError: where the file is missing or holds something else.
    """
    try:
        return (
            _of_rows(read_rows(path)) if path.suffix == ".csv" else _of_table(read_document(path))
        )
    except (ValueError, TypeError, UsageError) as error:
        what = error.what if isinstance(error, DemergeError) else error
        raise InputError(
            f"{path}: no file of weights: {what}",
            fix='for example {"weights": [0.5, 0.5], "blocks": {"mid": [0.3, 0.7]}}',
        ) from error


def check_order(path: Path, experts: Sequence[str]) -> None:
    """Refuse a file of weights that `demerge coefficients` found for the same experts in another order.

    Raises:
        UsageError: naming the order that it has.
    """
    record = read_document(path).get("record") if path.suffix != ".csv" else None
    try:
        named = [str(expert["path"]) for expert in record["inputs"]["experts"]] if record else []
    except (KeyError, TypeError):
        return
    there, given = ([Path(name).resolve() for name in names] for names in (named, experts))
    if there != given and sorted(there) == sorted(given):
        raise UsageError(
            f"{path} has weights for the experts in another order",
            fix=f"give them as {' '.join(named)}",
        )


def _of_rows(rows: list[list[str]]) -> tuple[list[float] | None, list[Rule]]:
    whole = [numbers for name, *numbers in rows if name.strip() == WHOLE]
    if len(whole) > 1:
        raise UsageError(f"{len(whole)} rows {WHOLE}")
    rules = [Rule.of(name.strip(), numbers, {}) for name, *numbers in rows if name.strip() != WHOLE]
    return ([number(text) for text in whole[0]] if whole else None), rules


def _of_table(table: Mapping[str, Any]) -> tuple[list[float] | None, list[Rule]]:
    check_known_keys(table, KEYS, "the table")
    whole = typed(table, "weights", list, "the table")
    parts = [typed(table, key, dict, "the table") or {} for key in ("tensors", "blocks")]
    rules = [Rule.of(name, numbers, {}) for part in parts for name, numbers in part.items()]
    return (None if whole is None else [number(value) for value in whole]), rules
