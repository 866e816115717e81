"""Cuts: exact, planted ones found, none between bins that noise rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from demerge.analysis.partitioning.map_reading import Reading, partition
from demerge.analysis.partitioning.objective import (
    ADAPTIVE,
    METHODS,
    SCORES,
    cover,
    equal_log_snr,
    least_width,
    nearest_edges,
)
from demerge.analysis.partitioning.search import total
from demerge.analysis.similarity import similarity
from demerge.errors import NumericalError, UsageError
from demerge.timesteps import Partition


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "edges", [[0, 3, 8], [0, 2, 7, 12], [0, 4, 8, 10, 16], [0, 1, 2, 3], [0, 5]]
)
def test_planted_cuts_are_recovered(
    planted: Any, method: str, score: str, edges: list[int]
) -> None:
    map = planted(edges)
    assert partition(map, len(edges) - 1, method, score=score, minimum=1).cuts == [
        map.edges[i] for i in edges[1:-1]
    ]


@pytest.mark.parametrize("score", SCORES)
def test_hierarchical_cuts_are_nested_and_the_program_is_no_worse(map_of: Any, score: str) -> None:
    rng = np.random.default_rng(5)
    mu = np.cumsum(rng.standard_normal((12, 20)), axis=0)
    map = map_of(3 * mu[:, None] + rng.standard_normal((12, 6, 20)))
    reading, before = Reading(map, score, minimum=1), set()
    for n in range(1, 9):
        greedy, exact = reading.partition(n, "hierarchical"), reading.partition(n)
        J = [total(reading.tables[0], nearest_edges(map, each)) for each in (greedy, exact)]
        assert len(greedy) == n and before < {0, *greedy.cuts} and J[0] <= J[1] + 1e-12 * abs(J[1])
        before = {0, *greedy.cuts}


def test_hierarchical_says_where_it_can_split_no_more(planted: Any) -> None:
    map = planted([0, 4, 9])
    assert partition(map, 3, minimum=3).cuts == [333, 667]
    with pytest.raises(NumericalError, match="no 3 ranges of 3 bins"):
        partition(map, 3, "hierarchical", minimum=3)


def test_the_default_least_width() -> None:
    assert [least_width(bins) for bins in (5, 10, 20, 21, 50, 100)] == [1, 1, 1, 2, 3, 5]


@pytest.mark.parametrize("score", SCORES)
def test_the_table_holds_what_the_definition_says(planted: Any, score: str) -> None:
    map = planted([0, 3, 5, 9])
    reading = Reading(map, score)
    table, bins, w = reading.tables[0], reading.bins, map.widths
    for a, b in ((2, 6), (0, 9), (3, 4)):
        square = w[a:b] @ bins.K[a:b, a:b] @ w[a:b]
        expected = {
            "step": np.sqrt(square),
            "energy": square / w[a:b].sum(),
            "cosine": bins.cosine[a:b, a:b].sum() / (b - a) / 9,
        }
        assert table[a, b] == pytest.approx(expected[score])
    assert not np.tril(table).any()


def test_the_least_width_holds(planted: Any) -> None:
    map = planted([0, 1, 2, 16])
    assert partition(map, 3).cuts == partition(map, 3, minimum=1).cuts == [62, 125]
    for method in ADAPTIVE:
        widths = np.diff(
            [map.edges.index(e) for e in [0, *partition(map, 3, method, minimum=4).cuts, 1000]]
        )
        assert widths.min() >= 4
        fine = planted([0, 1, 2, 42])
        widths = np.diff([fine.edges.index(e) for e in [0, *partition(fine, 3, method).cuts, 1000]])
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
    assert Reading(map).blocks.edges == (0, 1, 2, 3, 7, 8, 9, 10) and Reading(
        map
    ).blocks.known == pytest.approx(0.6)
    assert set(partition(map, 4, minimum=1).cuts) <= {100, 200, 300, 700, 800, 900}
    with pytest.raises(NumericalError, match="7 blocks") as error:
        partition(map, 8, minimum=1)
    assert "groups" in error.value.fix


def test_no_cut_is_made_where_most_is_unresolved(map_of: Any) -> None:
    rng, s = np.random.default_rng(0), np.zeros((10, 8, 12))
    s[6:] = np.eye(4, 12)[:, None] + 0.05 * rng.standard_normal((4, 8, 12))
    s[:6] = 3 * rng.standard_normal((6, 8, 12))
    with pytest.raises(NumericalError, match="noise on 40%"):
        partition(map_of(s), 2, minimum=1)


def test_unresolved_neighbours_are_merged_until_they_are_resolved(map_of: Any) -> None:
    rng = np.random.default_rng(3)
    s = 0.8 * np.eye(1, 30)[:, None] + 0.6 * rng.standard_normal((12, 8, 30))
    map = map_of(s)
    single = similarity(map).resolved.sum()
    assert 2 <= len(Reading(map).blocks) < 12 and Reading(map).blocks.known > 0.9 > single / 12


def test_noise_alone_gives_one_block_and_no_cut(map_of: Any) -> None:
    map = map_of(np.random.default_rng(0).standard_normal((8, 6, 200)))
    assert Reading(map).blocks.edges == (0, 8) and Reading(map).blocks.known == 0
    with pytest.raises(NumericalError):
        partition(map, 2)
    assert partition(map, 1).cuts == []
    assert partition(map, 4, "uniform").cuts == [250, 500, 750]


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
        partition(planted([0, 4, 8]), **arguments)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_n_ranges(planted: Any, method: str) -> None:
    assert len(partition(planted([0, 2, 5, 7, 12]), 4, method)) == 4
