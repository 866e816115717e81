"""Durations: what is read, and how they are printed."""

from __future__ import annotations

import pytest

from demerge.durations import format_seconds, parse_seconds
from demerge.errors import UsageError


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "0s", "-1m", "10 min", "1e3s", "٣s", "nan"])
def test_other_texts_are_no_durations(text: str) -> None:
    with pytest.raises(UsageError, match="not a duration"):
        parse_seconds(text)


def test_durations_are_said_for_a_person() -> None:
    assert [format_seconds(s) for s in (0.04, 3.21, 42, 119, 600, 9000)] == [
        "0.0 s",
        "3.2 s",
        "42 s",
        "119 s",
        "10 min",
        "2.5 h",
    ]
