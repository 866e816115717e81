"""Durations in words: `10m` in, `7 min` out."""

from __future__ import annotations

import re

from demerge.errors import UsageError

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_seconds(text: str) -> float:
    """Read a duration: `90s`, `10m` or `1.5h`.

    Raises:
        UsageError: if the text is not a duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip(), re.ASCII)
    if match is None or float(match[1]) == 0:
        fix = "give seconds, minutes or hours, for example 90s, 10m or 2h"
        raise UsageError(f"'{text}' is not a duration above 0", fix=fix)
    return float(match[1]) * UNITS[match[2]]


def write_seconds(seconds: float) -> str:
    """Return seconds as `parse_seconds` reads them."""
    return f"{seconds:f}s"


def format_seconds(seconds: float) -> str:
    """Return seconds for a person: `3.2 s`, `42 s`, `7 min`, `2.5 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
