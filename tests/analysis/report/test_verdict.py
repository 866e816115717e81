"""Several experts, or one? What a map answers of ranges of one's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from demerge.analysis import Reading, summarize
from demerge.analysis.report.next_steps import CommandNames, next_steps
from demerge.analysis.report.summary import ConflictSummary
from demerge.analysis.report.verdict import verdict
from demerge.conflict import Array, ConflictMap
from demerge.timesteps import Partition

HIGH_AND_LOW = Partition.from_cuts(1000, [875])
STRENGTHS = np.array([0.3, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 3.0])


def judge(map: ConflictMap, given: Partition = HIGH_AND_LOW) -> ConflictSummary:
    return summarize(Reading(map), given=given)


def gradients(rng: Any, cosine: float, noise: float, draws: str, M: int = 8) -> Array:
    """Gradients [8 M 100] of unequal lengths; those of the last bin have a cosine with the rest."""
    mu = np.repeat(np.eye(1, 100), 8, axis=0)
    mu[7, :2] = cosine, (1 - cosine**2) ** 0.5
    z = rng.standard_normal((8, M, 100)) / 10
    if draws == "shared":
        z = 0.6 * z + 0.8 * rng.standard_normal((1, M, 100)) / 10
    return np.asarray(STRENGTHS[:, None, None] * (mu[:, None] + noise * z))


def test_planted_conflict_says_two_and_planted_agreement_one(planted: Any) -> None:
    two, one = judge(planted([0, 7, 8])), judge(planted([0, 8]))
    assert two.lines()[0].startswith("verdict       Two experts are worth it: a joint AdamW step")
    assert "Train an expert for each range" in two.lines()[0]
    assert (two.verdict.kind, two.verdict.partition) == ("conflict", HIGH_AND_LOW)
    assert one.lines()[0].startswith("verdict       One model will do: a joint AdamW step misses")
    assert "the interval covers 0. Train jointly, or merge" in one.lines()[0]
    assert (one.verdict.kind, len(one.verdict.partition)) == ("alike", 1)
    assert (two.expected_gain.is_promised, one.expected_gain.is_promised) == (True, False)
    assert two.verdict.share == two.expected_gain.share, "the interval of exactly these ranges"
    assert (two.verdict.headline, one.verdict.headline) == (
        "Two experts are worth it",
        "One model will do",
    )


def test_three_ranges_of_ones_own(planted: Any) -> None:
    said = judge(planted([0, 2, 6, 8]), Partition.from_cuts(1000, [250, 750]))
    assert said.verdict.finding.startswith("Three experts are worth it")


def test_a_map_that_cannot_say_says_so(planted: Any, map_of: Any) -> None:
    noisy = judge(planted([0, 7, 8], noise=30.0))
    assert noisy.verdict.kind == "unresolved" and not noisy.expected_gain.is_promised
    assert noisy.lines()[0].startswith("verdict       It is not known whether one model will do: ")
    weak = judge(map_of(gradients(np.random.default_rng(0), 1.0, 4.0, "independent")))
    assert weak.verdict.kind == "alike" and "% open; more --groups" in weak.verdict.advice
    whole = judge(planted([0, 7, 8]), Partition.uniform(1000, 1))
    assert whole.verdict.finding == "One model will do: one range leaves nothing to decouple."


def test_a_cut_inside_of_a_bin_is_named(planted: Any) -> None:
    inside, aligned = judge(planted([0, 7, 8]), Partition.from_cuts(1000, [900])), None
    (line,) = [line for line in inside.lines() if line.startswith("bins ")]
    assert "no bin is cut at 900" in line and "analyze --ranges 0:900,900:1000" in line
    aligned = judge(planted([0, 7, 8]))
    assert not any(line.startswith("bins ") for line in aligned.lines())
    commands = [text for step in next_steps(aligned, CommandNames()) for text in step.commands]
    assert any("analyze" in text and "--ranges 0:875,875:1000" in text for text in commands)


@pytest.mark.parametrize("draws", ["shared", "independent"])
def test_agreement_is_called_a_conflict_rarely(map_of: Any, draws: str) -> None:
    rng = np.random.default_rng(0)
    maps = [map_of(gradients(rng, 1.0, noise, draws, M=6)) for noise in (0.3, 2.0) * 30]
    assert sum(verdict(Reading(map), HIGH_AND_LOW).is_promised for map in maps) <= 0.05 * len(maps)


def test_conflict_is_found_where_noise_allows_it(map_of: Any) -> None:
    rng = np.random.default_rng(0)
    maps = [map_of(gradients(rng, 0.7, 1.0, "shared")) for _ in range(20)]
    assert all(verdict(Reading(map), HIGH_AND_LOW).is_promised for map in maps)


@pytest.mark.slow
@pytest.mark.parametrize("draws", ["shared", "independent"])
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("M", [5, 8, 16])
def test_agreement_is_called_a_conflict_in_five_percent_of_many_maps(
    map_of: Any, draws: str, noise: float, M: int
) -> None:
    rng, runs = np.random.default_rng(M), 400
    maps = (map_of(gradients(rng, 1.0, noise, draws, M)) for _ in range(runs))
    wrong = sum(verdict(Reading(map), HIGH_AND_LOW).is_promised for map in maps)
    assert wrong <= 0.05 * runs, wrong
