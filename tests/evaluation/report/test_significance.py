"""The verdict is a test: false verdicts of whole tables, power, Holm's correction, and what is not tested."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_rel

from demerge.errors import ComparisonError
from demerge.evaluation.report.significance import LEVEL, compare_rows, detectable, holm, paired_p
from demerge.evaluation.scores import Kind, Row, Scores, rows_of

Make = Callable[..., list[Scores]]
SEVEN: tuple[tuple[str, Kind], ...] = (
    ("base", "base"),
    ("joint", "joint"),
    ("joint-0.5", "joint"),
    ("average", "merge"),
    ("ties", "merge"),
    ("dare", "merge"),
    ("ensemble", "ensemble"),
)


def seven(make_scores: Make, values: np.ndarray) -> list[Row]:
    return rows_of(
        score
        for (name, kind), own in zip(SEVEN, values, strict=True)
        for score in make_scores(name, kind, own.tolist())
    )


def pairs_of(rows: list[Row]) -> list[tuple[int, int]]:
    keys = [row.key for row in rows]
    return sorted({tuple(sorted((keys.index(a), keys.index(b)))) for a, b in compare_rows(rows)})  # type: ignore[misc]


def adjusted(values: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Adjusted p [tables m] of tables [tables 7 S]."""
    return holm(np.stack([paired_p(values[:, a] - values[:, b]) for a, b in pairs], -1))


def test_p_is_that_of_scipy() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 50, 5))
    np.testing.assert_allclose(paired_p(a - b), ttest_rel(a, b, axis=-1).pvalue, rtol=1e-9)
    assert paired_p([0.0, 0.0, 0.0]) == 1
    assert paired_p([2.0, 2.0, 2.0]) == 0


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.6]), [1, 1])


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_a_table_of_equal_models_rarely_holds_a_false_verdict(
    make_scores: Make, seeds: int
) -> None:
    """Seven equal models on common noise: some verdict in at most 5 % of 20,000 tables."""
    random = np.random.default_rng(seeds)
    tables = (
        8
        + 0.5 * random.normal(size=(20_000, 1, seeds))
        + 0.2 * random.normal(size=(20_000, 7, seeds))
    )
    pairs = pairs_of(seven(make_scores, tables[0]))
    assert len(pairs) == 6 + 5 + 4 + 3, (
        "base, two joint controls, three merges against the ensemble"
    )
    false = float((adjusted(tables, pairs).min(-1) < LEVEL).mean())
    assert 0.01 < false <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 20_000)


def test_power_rises_with_the_seeds(make_scores: Make) -> None:
    """A merge better by 2 standard deviations of the paired difference."""
    found = []
    for seeds in (3, 5, 10):
        tables = np.random.default_rng(seeds).normal(size=(4000, 7, seeds)) / math.sqrt(2)
        tables[:, 4] -= 2
        pairs = pairs_of(seven(make_scores, tables[0]))
        found.append(float((adjusted(tables, pairs)[:, pairs.index((0, 4))] < LEVEL).mean()))
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.9


def test_tables_of_scores_give_the_same_p_as_the_simulation(make_scores: Make) -> None:
    tables = 8 + np.random.default_rng(1).normal(size=(20, 7, 5)) * 0.3
    for values in tables:
        rows = seven(make_scores, values)
        pairs = pairs_of(rows)
        own = [compare_rows(rows)[rows[a].key, rows[b].key].p for a, b in pairs]
        np.testing.assert_allclose(own, adjusted(values[None], pairs)[0])


@pytest.mark.parametrize(
    ("model", "base", "expected"),
    [
        ([7.0, 7.15, 7.2], [8.0, 8.1, 8.25], "better"),
        ([9.0, 9.15, 9.2], [8.0, 8.1, 8.25], "worse"),
        ([7.0, 8.5, 7.4], [8.0, 8.1, 8.2], "inconclusive"),  # large but not steady over seeds
        ([8.0, 8.1, 8.2], [8.0, 8.1, 8.2], "inconclusive"),  # the same numbers
        ([7.0, 7.1], [8.0, 8.1], "none"),
        ([7.0], [8.0], "none"),
    ],
)
def test_verdicts(make_scores: Make, model: list[float], base: list[float], expected: str) -> None:
    a, b = rows_of(make_scores("a", "merge", model) + make_scores("b", "base", base))
    found = compare_rows([a, b])
    assert found[a.key, b.key].verdict == expected
    assert found[b.key, a.key].difference == -found[a.key, b.key].difference


def test_what_is_not_tested_says_why(make_scores: Make) -> None:
    few = rows_of(make_scores("a", "merge", [7.0, 7.1]) + make_scores("b", "base", [8.0, 8.1]))
    assert compare_rows(few)[few[0].key, few[1].key].word == "2 common seeds of 3"
    flat = rows_of(
        make_scores("a", "merge", [7.0, 7.1, 7.2], num_images=64)
        + make_scores("b", "base", [8.0] * 3, num_images=64)
    )
    found = compare_rows(flat)[flat[0].key, flat[1].key]
    assert (found.word, found.verdict, math.isnan(found.p)) == ("rank-deficient", "none", True)
    moved = replace(few[1], scores=tuple(replace(s, seed=s.seed + 9) for s in few[1].scores))
    apart = compare_rows([few[0], moved])[few[0].key, moved.key]
    assert apart.word == "0 common seeds of 3"
    assert math.isnan(apart.difference)


def test_more_comparisons_need_more_evidence(make_scores: Make) -> None:
    base, ties = [8.0, 8.1, 8.25], [7.8, 7.92, 7.95]
    alone = rows_of(make_scores("ties", "merge", ties) + make_scores("base", "base", base))
    others = [s for i in range(8) for s in make_scores(f"m{i}", "merge", [8.0 + i / 9, 8.4, 8.0])]
    crowd = rows_of([s for row in alone for s in row.scores] + others)
    key = ("ties", "merge"), ("base", "base")
    assert compare_rows(alone)[key].verdict == "better"
    assert compare_rows(crowd)[key].verdict == "inconclusive"
    assert compare_rows(crowd)[key].family == 9
    assert detectable(3, 1) == pytest.approx(2.48, abs=0.01)
    assert detectable(3, 9) > detectable(5, 9) > detectable(10, 9)


def test_unlike_protocols_are_not_compared(make_scores: Make) -> None:
    with pytest.raises(ComparisonError, match="steps"):
        compare_rows(
            rows_of(
                make_scores("a", "merge", [7.0] * 3, steps=9) + make_scores("b", "base", [8.0] * 3)
            )
        )


def test_higher_is_better_for_precision(make_scores: Make) -> None:
    rows = rows_of(
        make_scores("a", "merge", [7.0, 7.1, 7.2]) + make_scores("b", "base", [8.0, 8.1, 8.2])
    )
    low = [replace(s, metrics={"precision": 0.5 + s.seed / 1e3}) for s in rows[0].scores]
    assert (
        compare_rows([replace(rows[0], scores=tuple(low)), rows[1]], "precision")[
            rows[0].key, rows[1].key
        ].verdict
        == "worse"
    )
