"""How a stage reports its progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A function that is called after each piece of work."""

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Take the number of pieces done, that of all pieces, and a text on the current one."""


def silent(done: int, total: int, text: str = "") -> None:
    """Report nothing."""
