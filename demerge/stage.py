"""The protocol of all stages: options in, a plan that can be read, a result.

plan(options) -> Plan       checks everything, loads what it must, computes nothing lasting
Plan.describe() -> lines    what will be done; it prints what is known and computes nothing
Plan.cost() -> Cost         what it will take
Plan.run(progress) -> Result
Result.lines()              what was found, the most important first
Result.document()           the same as JSON values
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from demerge.progress import Progress, silent

R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a stage will take; None if it is not known before it runs.

    Attributes:
        steps: pieces of work, as `Progress` counts them.
        seconds: time, estimated.
        memory: bytes of memory.
        disk: bytes on disk.
    """

    steps: int = 1
    seconds: float | None = None
    memory: int | None = None
    disk: int | None = None


class Result(Protocol):
    """The result of a stage."""

    def lines(self) -> list[str]:
        """Return the result for a person."""

    def document(self) -> dict[str, Any]:
        """Return the result as JSON values."""


class Plan(Protocol[R_co]):
    """A stage whose options are checked and whose inputs are open."""

    def describe(self) -> list[str]:
        """Return what will be done, for a person; nothing is computed."""

    def cost(self) -> Cost:
        """Return what it will take; nothing is computed."""

    def run(self, progress: Progress = silent) -> R_co:
        """Do the work; what is written is whole or absent."""


class Preview(Protocol):
    """A plan that `--dry-run` can print."""

    def describe(self) -> list[str]:
        """Return what will be done, for a person; nothing is computed."""

    def document(self) -> dict[str, Any]:
        """Return the same as JSON values."""
