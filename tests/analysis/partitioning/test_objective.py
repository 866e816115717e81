"""Cuts: exact, planted ones found, none between bins that noise rules."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from demerge.analysis.partitioning.objective import (
    FOUND,
    METHODS,
    SCORES,
    Objective,
    cover,
    cut,
    equal_log_snr,
    least_width,
    nearest_edges,
)
from demerge.analysis.partitioning.resolution import blocks
from demerge.analysis.similarity import similarity
from demerge.errors import NumericalError, UsageError
from demerge.timesteps import Partition


@pytest.mark.parametrize("method", FOUND)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "edges", [[0, 3, 8], [0, 2, 7, 12], [0, 4, 8, 10, 16], [0, 1, 2, 3], [0, 5]]
)
def test_planted_cuts_are_recovered(
    planted: Any, method: str, score: str, edges: list[int]
) -> None:
    map = planted(edges)
    assert cut(map, len(edges) - 1, method, score=score, minimum=1).cuts == [
        map.edges[i] for i in edges[1:-1]
    ]


@pytest.mark.parametrize("score", SCORES)
def test_hierarchical_cuts_are_nested_and_the_program_is_no_worse(map_of: Any, score: str) -> None:
    rng = np.random.default_rng(5)
    mu = np.cumsum(rng.standard_normal((12, 20)), axis=0)
    map = map_of(3 * mu[:, None] + rng.standard_normal((12, 6, 20)))
    found = similarity(map)
    objective, before = Objective.of(map, score, found), set()
    for n in range(1, 9):
        greedy = cut(map, n, "hierarchical", score=score)
        exact = cut(map, n, score=score, minimum=1)
        J = [objective.gain(found.K, cover(map, partition)) for partition in (greedy, exact)]
        assert len(greedy) == n and before < {0, *greedy.cuts} and J[0] <= J[1] + 1e-12 * abs(J[1])
        before = {0, *greedy.cuts}


def test_hierarchical_says_where_it_can_split_no_more(planted: Any) -> None:
    map = planted([0, 4, 9])
    assert cut(map, 3, minimum=3).cuts == [333, 667]
    with pytest.raises(NumericalError, match="no 3 ranges of 3 bins"):
        cut(map, 3, "hierarchical", minimum=3)


def test_the_default_least_width() -> None:
    assert [least_width(bins) for bins in (5, 10, 20, 21, 50, 100)] == [1, 1, 1, 2, 3, 5]


@pytest.mark.parametrize("score", SCORES)
def test_the_table_and_the_gain_agree(planted: Any, score: str) -> None:
    map = planted([0, 3, 5, 9])
    found = similarity(map)
    objective = Objective.of(map, score, found)
    table = objective.table(found.K)
    edges = [0, 2, 6, 9]
    partition = Partition.from_cuts(1000, [map.edges[i] for i in edges[1:-1]])
    direct = sum(table[a, b] for a, b in pairwise(edges)) - table[0, 9]
    assert objective.gain(found.K, cover(map, partition)) == pytest.approx(direct)
    K, w = found.K, map.widths
    if score == "step":
        assert table[2, 6] == pytest.approx(np.sqrt(w[2:6] @ K[2:6, 2:6] @ w[2:6]))
    if score == "cosine":
        assert table[2, 6] == pytest.approx(found.cosine[2:6, 2:6].sum() / 4 / 9)
    assert objective.gain(K, np.ones((1, 9))) == pytest.approx(0)


def test_the_least_width_holds(planted: Any) -> None:
    map = planted([0, 1, 2, 16])
    assert cut(map, 3).cuts == cut(map, 3, minimum=1).cuts == [62, 125]
    for method in FOUND:
        widths = np.diff(
            [map.edges.index(e) for e in [0, *cut(map, 3, method, minimum=4).cuts, 1000]]
        )
        assert widths.min() >= 4
        fine = planted([0, 1, 2, 42])
        widths = np.diff([fine.edges.index(e) for e in [0, *cut(fine, 3, method).cuts, 1000]])
        assert widths.min() == least_width(42) == 3


def test_cuts_off_the_grid_are_moved_to_the_nearest_edges(map_of: Any) -> None:
    map = map_of(np.ones((10, 5, 2)))
    places = {
        (249,): [0, 2, 10],
        (251,): [0, 3, 10],
        (250, 350): [0, 2, 4, 10],
        (20, 40, 980): [0, 10],
        (): [0, 10],
    }
    for cuts, edges in places.items():
        assert nearest_edges(map, Partition.from_cuts(1000, list(cuts))) == edges
    for N, n in ((20, 7), (10, 4), (10, 10), (7, 5)):
        assert len(nearest_edges(map_of(np.ones((N, 5, 2))), Partition.uniform(1000, n))) == n + 1
    uneven = map_of(np.ones((3, 5, 2)), edges=[0, 10, 20, 40])
    assert nearest_edges(uneven, Partition.from_cuts(40, [4, 32])) == [0, 3]
    assert nearest_edges(uneven, Partition.from_cuts(40, [6, 29])) == [0, 1, 2, 3]


def test_no_cut_separates_two_unresolved_bins(map_of: Any) -> None:
    rng, s = np.random.default_rng(0), np.zeros((10, 8, 12))
    s[[0, 1, 2, 7, 8, 9]] = np.eye(6, 12)[:, None] + 0.05 * rng.standard_normal((6, 8, 12))
    s[3:7] = 3 * rng.standard_normal((4, 8, 12))
    map = map_of(s)
    assert blocks(map).edges == (0, 1, 2, 3, 7, 8, 9, 10) and blocks(map).known == pytest.approx(
        0.6
    )
    assert set(cut(map, 4, minimum=1).cuts) <= {100, 200, 300, 700, 800, 900}
    with pytest.raises(NumericalError, match="7 blocks") as error:
        cut(map, 8, minimum=1)
    assert "groups" in error.value.fix


def test_no_cut_is_made_where_most_is_unresolved(map_of: Any) -> None:
    rng, s = np.random.default_rng(0), np.zeros((10, 8, 12))
    s[6:] = np.eye(4, 12)[:, None] + 0.05 * rng.standard_normal((4, 8, 12))
    s[:6] = 3 * rng.standard_normal((6, 8, 12))
    with pytest.raises(NumericalError, match="resolved on 40%"):
        cut(map_of(s), 2, minimum=1)


def test_unresolved_neighbours_are_merged_until_they_are_resolved(map_of: Any) -> None:
    rng = np.random.default_rng(3)
    s = 0.8 * np.eye(1, 30)[:, None] + 0.6 * rng.standard_normal((12, 8, 30))
    map = map_of(s)
    single = similarity(map).resolved.sum()
    assert 2 <= len(blocks(map)) < 12 and blocks(map).known > 0.9 > single / 12


def test_noise_alone_gives_one_block_and_no_cut(map_of: Any) -> None:
    map = map_of(np.random.default_rng(0).standard_normal((8, 6, 200)))
    assert blocks(map).edges == (0, 8) and blocks(map).known == 0
    with pytest.raises(NumericalError):
        cut(map, 2)
    assert cut(map, 1).cuts == []
    assert cut(map, 4, "uniform").cuts == [250, 500, 750]


@pytest.mark.parametrize("n", [1, 2, 5, 30, 1000])
def test_equal_log_snr_has_n_ranges_of_equal_width_where_it_can(planted: Any, n: int) -> None:
    map = planted([0, 4, 8])
    partition = equal_log_snr(map, n)
    assert len(partition) == n and partition.total == 1000
    if n <= 5:  # the fixture's log SNR is linear in t
        assert np.ptp([len(r) for r in partition]) <= 2


def test_equal_log_snr_of_a_steep_schedule(planted: Any) -> None:
    from dataclasses import replace

    map = replace(planted([0, 4, 8]), log_snr=9 - 19 * np.linspace(0, 1, 1000) ** 0.1)
    assert equal_log_snr(map, 4).cuts == [1, 2, 57]
    assert len(equal_log_snr(map, 1000)) == 1000


def test_cover_splits_a_bin_by_the_share_of_its_timesteps(map_of: Any) -> None:
    map = map_of(np.ones((3, 5, 2)), edges=[0, 10, 20, 40])
    assert cover(map, Partition.from_cuts(40, [5, 30])).tolist() == [
        [0.5, 0, 0],
        [0.5, 1, 0.5],
        [0, 0, 0.5],
    ]


@pytest.mark.parametrize("arguments", [{"n": 0}, {"n": 1001}, {"method": "best"}, {"score": "sum"}])
def test_wrong_arguments_are_usage_errors(planted: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        cut(planted([0, 4, 8]), **arguments)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_n_ranges(planted: Any, method: str) -> None:
    assert len(cut(planted([0, 2, 5, 7, 12]), 4, method)) == 4
