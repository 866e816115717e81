"""How a stage tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A function that is called after each piece of work."""

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Take the pieces done, the pieces in all, and a few words on the current one."""


def silent(done: int, total: int, text: str = "") -> None:
    """Tell nobody."""
