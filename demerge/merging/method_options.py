"""The options of a merge method: read from its signature, checked by their rule, parsed from text.

An option's help comes from the `Args:` of the method's docstring, or for words that several methods
share from `HELP`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from demerge.errors import UsageError

HELP = {
    "density": "share of the entries that are kept",
    "mean": "divisor of the ties merge: the weights that agree, their count, or none",
    "rescale": "how thinned task vectors regain their length",
    "scale": "lambda, the factor of the merged task vector",
    "scope": "whether statistics are taken over the model or each tensor",
    "then": "how the thinned task vectors are merged: linear, or the ties merge",
    "undecided": "sign of entries with even votes in the ties merge",
}


@dataclass(frozen=True, slots=True)
class Between:
    """The rule low <= value <= high; with `open_low`, low < value."""

    low: float
    high: float
    open_low: bool = False

    def holds(self, value: float) -> bool:
        """Whether the rule holds; for NaN it does not."""
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


Share = Annotated[float, Between(0, 1, open_low=True)]


@dataclass(frozen=True, slots=True)
class Option:
    """One of the user's options: its default, its rule (type, choices or interval) and its help."""

    default: Any
    kind: type
    choices: tuple[str, ...] = ()
    between: Between | None = None
    help: str = ""

    @property
    def rule(self) -> str:
        """The rule in words."""
        interval = f" in {self.between}" if self.between else ""
        return " | ".join(self.choices) or self.kind.__name__ + interval

    def parse(self, name: str, value: Any) -> Any:
        """Return the value, converted if it is text.

        Raises:
            UsageError: if it breaks the rule.
        """
        try:
            parsed = self._convert(value)
        except (TypeError, ValueError):
            parsed = None
        if parsed is None or not self._allows(parsed):
            fix = f"for example {name}={self.default}"
            raise UsageError(f"option {name}={value} is not {self.rule}", fix=fix)
        return parsed

    def _convert(self, value: Any) -> Any:
        """Return a value of the option's type; true is not 1, and 1.5 is not 1."""
        if self.kind is bool:
            return {"true": True, "false": False}.get(str(value).lower())
        is_fraction = isinstance(value, float) and not value.is_integer()
        if isinstance(value, bool) or (self.kind is int and is_fraction):
            return None
        return self.kind(value)

    def _allows(self, value: Any) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        in_choices = not self.choices or value in self.choices
        return in_choices and (self.between is None or self.between.holds(value))


def read_option(name: str, default: Any, hint: Any, help: str = "") -> Option:
    """Return the option that a parameter declares; else its default gives the type."""
    between, hint = None, type(default) if hint is None else hint
    if get_origin(hint) is Annotated:
        hint, *rules = get_args(hint)
        between = next((r for r in rules if isinstance(r, Between)), None)
    if get_origin(hint) is Literal:
        return Option(default, str, choices=get_args(hint), help=help)
    if hint not in (float, int, bool, str):
        fix = "annotate float, int, bool, str, Literal[...] or Annotated[float, Between(0, 1)]"
        what = f"option {name}={default} of a merge method has the type {hint}"
        raise UsageError(what, fix=fix)
    return Option(default, hint, between=between, help=help)


def read_help(docstring: str, name: str) -> str:
    """Return a parameter's text in the `Args:` of a docstring, else that of its name."""
    entries = docstring.partition("\nArgs:\n")[2].partition("\n\n")[0]
    found = re.search(rf"^    {name}: (.*(?:\n {{8}}.*)*)", entries, re.MULTILINE)
    return " ".join(found[1].split()) if found else HELP.get(name, "")
