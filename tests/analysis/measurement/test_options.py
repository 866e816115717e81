"""The options of a measurement: durations, what may not go together, and how many groups."""

from __future__ import annotations

from typing import Any

import pytest

from demerge.analysis.measurement.options import (
    GROUPS,
    MAX_GROUPS,
    MeasurementOptions,
)
from demerge.analysis.partitioning.options import PartitionOptions, parse_ranges
from demerge.analysis.planning.ranges import split_ranges
from demerge.conflict import MIN_GROUPS
from demerge.errors import UsageError


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 0.0},
        {"target_se": -1.0},
        {"target_se": float("nan")},
        {"target_se": 0.1, "bins": 1},
    ],
)
def test_wrong_targets_are_usage_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        MeasurementOptions(**wrong)


def test_the_number_of_groups_is_fixed_or_open() -> None:
    assert MeasurementOptions().most_groups == GROUPS
    assert MeasurementOptions(budget=60.0).most_groups == MAX_GROUPS
    assert MeasurementOptions(target_se=0.1, groups=MIN_GROUPS).most_groups == MIN_GROUPS
    with pytest.raises(UsageError):
        MeasurementOptions(groups=MIN_GROUPS - 1)


def test_a_number_of_ranges_auto_or_a_text() -> None:
    assert (parse_ranges("3"), parse_ranges("auto")) == (3, None)
    assert PartitionOptions(ranges=parse_ranges("0:875,875:1000")).ranges == "0:875,875:1000"
    for text in ("some", "-1", "1.5", ""):
        with pytest.raises(UsageError, match="range"):
            split_ranges(parse_ranges(text), 1000)
    with pytest.raises(UsageError, match="at least 1"):
        PartitionOptions(ranges=0)
