"""Errors a user can cause, and the exit code each one ends the program with.

    DemergeError            1   a bug in demerge, when nothing below fits
    ├── UsageError          2   an argument, option or configuration is wrong
    ├── InputError          3   a file that was read is wrong
    ├── ResourceError       4   not enough disk, memory or accelerator
    ├── NumericalError      5   NaN or Inf, a loss that diverged
    ├── ComparisonError     6   scores of different protocols
    └── Preempted          75   stopped after a valid checkpoint; run the same command again

Every message says what is wrong: the argument or file, the value and the rule. `fix` says what to
do.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 1900  # characters of a sentence: hostile files have names and values of any length
LISTED = 5


def listed(names: Sequence[str]) -> str:
    """Return the first five names, each cut to 120 characters, and the number of the others."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(name[:120] for name in names[:LISTED]) + more


class DemergeError(Exception):
    """Base of the errors that demerge raises on purpose: what is wrong, and what to do."""

    exit_code = 1

    def __init__(self, what: str, *, fix: str = "") -> None:
        what = what if len(what) <= LONGEST else f"{what[: LONGEST - 500]} ... {what[-400:]}"
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}" if self.fix else self.what


class UsageError(DemergeError):
    """An argument, an option or a configuration breaks a rule."""

    exit_code = 2


class InputError(DemergeError):
    """A file is missing, damaged, hostile or of another kind."""

    exit_code = 3


class ResourceError(DemergeError):
    """Disk, memory or accelerator do not suffice."""

    exit_code = 4


class NumericalError(DemergeError):
    """A computation produced NaN or Inf."""

    exit_code = 5


class ComparisonError(DemergeError):
    """Scores of different protocols cannot be compared."""

    exit_code = 6


class Preempted(DemergeError):
    """The work stopped after a checkpoint; the same command continues it."""

    exit_code = 75
