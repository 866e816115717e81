"""What is asked of a measurement of gradients, each value checked by itself.

The number of groups is fixed, or open: with a `budget` of seconds, as many groups as fit; with an `se`, as many as it takes
until the similarity of neighbouring bins is that sure (budget.py). Then `groups` is the most there may be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from demerge.conflict import MIN_GROUPS
from demerge.errors import UsageError
from demerge.reprs import stated

DRAWS = ("shared", "independent")
METRICS = ("euclid", "adam")
ENGINES = ("auto", "exact", "sketch")
ANTITHETIC = ("off", "on", "auto")
PRECISIONS = ("no", "bf16")
MEMORY = 2 << 30
GROUPS = 8
MOST_GROUPS = 64  # where their number is open
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Settings:
    """How gradients are measured; see `measure`.

    Raises:
        UsageError: where a value is out of its range.
    """

    bins: int = 20
    groups: int = GROUPS
    batch_size: int = 16
    seed: int = 0
    draws: str = "shared"
    antithetic: str | bool = "off"
    metric: str = "euclid"
    engine: str = "auto"
    params: str = "all"
    layers: bool = False
    memory: int = MEMORY
    budget: float | None = None
    se: float | None = None
    precision: str = "no"

    __repr__ = stated

    def __post_init__(self) -> None:
        if isinstance(self.antithetic, bool):
            object.__setattr__(self, "antithetic", "on" if self.antithetic else "off")
        if self.groups < MIN_GROUPS:
            raise UsageError(
                f"{self.groups} groups are too few for errors", fix=f"use at least {MIN_GROUPS}"
            )
        if min(self.bins, self.batch_size, self.memory) < 1:
            raise UsageError(
                f"{self.bins} bins, batch size {self.batch_size} and {self.memory} bytes must all be at least 1",
                fix="give more",
            )
        for name, value, known in (
            ("draws", self.draws, DRAWS),
            ("metric", self.metric, METRICS),
            ("engine", self.engine, ENGINES),
            ("antithetic", self.antithetic, ANTITHETIC),
            ("mixed precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise UsageError(
                    f"{name} '{value}' is unknown", fix=f"use one of {', '.join(known)}"
                )
        if self.antithetic != "off" and self.batch_size % 2:
            raise UsageError(
                f"batch size {self.batch_size} makes no antithetic pairs", fix="give an even one"
            )
        for name, number in (("budget", self.budget), ("se", self.se)):
            if number is not None and not 0 < number < float("inf"):
                raise UsageError(
                    f"{name} {number} is not positive and finite", fix=f"give a {name} above 0"
                )
        if self.se is not None and self.bins < 2:
            raise UsageError(
                "se is that of the similarity of neighbouring bins, and there is one bin",
                fix="give more bins",
            )

    @property
    def open(self) -> bool:
        """Whether the number of groups is found on the way."""
        return self.budget is not None or self.se is not None


def groups_of(given: int | None, *, open: bool) -> int:
    """Return the number of groups, or the most there may be, where none is given."""
    return given if given is not None else MOST_GROUPS if open else GROUPS


def seconds_of(text: str) -> float:
    """Read a duration: `90s`, `10m` or `1.5h`.

    Raises:
        UsageError: where it is none, or 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip(), re.ASCII)
    if match is None or float(match[1]) == 0:
        raise UsageError(
            f"budget '{text}' is not a duration",
            fix="give seconds, minutes or hours, for example 90s, 10m or 2h",
        )
    return float(match[1]) * UNITS[match[2]]


def duration(seconds: float) -> str:
    """Return seconds for a person: `3.2 s`, `42 s`, `7 min`, `2.5 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
