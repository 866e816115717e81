"""The options of a merge method: read from a signature, checked by type, choices or interval, and parsed from text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from demerge.errors import UsageError


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


@dataclass(frozen=True, slots=True)
class Option:
    """One of the user's options: its default, and its rule: type, choices or interval."""

    default: Any
    kind: type
    choices: tuple[str, ...] = ()
    between: Between | None = None

    @property
    def rule(self) -> str:
        """The rule in words."""
        return (
            " | ".join(self.choices)
            or f"{self.kind.__name__}{f' in {self.between}' if self.between else ''}"
        )

    def parse(self, name: str, value: Any) -> Any:
        """Return the value, converted from text where it is text.

        Raises:
            UsageError: where the rule is broken.
        """
        try:
            parsed = _boolean(value) if self.kind is bool else self._converted(value)
        except (TypeError, ValueError):
            parsed = None
        among = not self.choices or parsed in self.choices
        infinite = isinstance(parsed, float) and not math.isfinite(parsed)
        if (
            parsed is None
            or infinite
            or not among
            or not (self.between is None or self.between.holds(parsed))
        ):
            raise UsageError(
                f"option {name}={value} is not {self.rule}",
                fix=f"for example {name}={self.default}",
            )
        return parsed

    def _converted(self, value: Any) -> Any:
        """Return a number or text; true is not 1, and 1.5 is not 1."""
        if isinstance(value, bool) or (
            self.kind is int and isinstance(value, float) and not value.is_integer()
        ):
            raise ValueError(value)
        return self.kind(value)


def option(name: str, default: Any, hint: Any) -> Option:
    """Return the option that a parameter's default and annotation declare; without one, the type is that of the default.

    Raises:
        UsageError: where the type is none of those that can be written on a command line.
    """
    between, hint = None, type(default) if hint is None else hint
    if get_origin(hint) is Annotated:
        hint, *rules = get_args(hint)
        between = next((r for r in rules if isinstance(r, Between)), None)
    if get_origin(hint) is Literal:
        return Option(default, str, choices=get_args(hint))
    if hint not in (float, int, bool, str):
        fix = "annotate float, int, bool, str, Literal[...] or Annotated[float, Between(0, 1)]"
        raise UsageError(
            f"option {name}={default} of a merge method is of the type {hint}", fix=fix
        )
    return Option(default, hint, between=between)


def _boolean(value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"
