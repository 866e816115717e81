"""Partitions that make a sum over ranges large: the program equals brute force, nested splits never pass it."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demerge.analysis.partitioning.search import best_edges, nested_edges, total
from demerge.errors import NumericalError


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10), st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6))
def test_the_program_equals_brute_force(N: int, n: int, minimum: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((N + 1, N + 1))
    allowed = [0, *[i for i in range(1, N) if rng.random() < 0.8], N]
    ways = [[0, *inner, N] for inner in combinations(allowed[1:-1], n - 1)]
    ways = [way for way in ways if min(np.diff(way)) >= minimum]
    if not ways:
        with pytest.raises(NumericalError, match="give no"):
            best_edges(table, [n], allowed, minimum)
        return
    best = max(ways, key=lambda way: sum(table[a, b] for a, b in pairwise(way)))
    (found,) = best_edges(table, [n], allowed, minimum)
    assert found.tolist() == best


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10), st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6))
def test_nested_is_the_greedy_refinement_and_never_better_than_the_program(
    N: int, n: int, minimum: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((N + 1, N + 1))
    allowed = [0, *[i for i in range(1, N) if rng.random() < 0.8], N]
    found = nested_edges(table, n, allowed, minimum)
    assert found[0] == [0, N] and len(found) <= n
    for before, after in pairwise(found):
        (new,) = set(after) - set(before)
        ways = [sorted([*before, c]) for c in set(allowed) - set(before)]
        best = max(total(table, way) for way in ways if min(np.diff(way)) >= minimum)
        assert (
            set(before) < set(after)
            and new in allowed
            and total(table, after) == pytest.approx(best)
        )
    for edges in found[1:]:
        assert (
            total(table, edges)
            <= total(table, best_edges(table, [len(edges) - 1], allowed, minimum)[0]) + 1e-12
        )
    if len(found) < n:
        ways = [sorted([*found[-1], c]) for c in set(allowed) - set(found[-1])]
        assert not any(min(np.diff(way)) >= minimum for way in ways)


def test_nested_takes_the_split_that_gains_most_and_of_equals_the_first() -> None:
    table = np.zeros((5, 5))
    table[0, 3] = table[1, 4] = 1
    table[1, 3] = 0.5
    assert nested_edges(table, 4, range(5)) == [[0, 4], [0, 1, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]
    assert nested_edges(table, 4, [0, 2, 4]) == [[0, 4], [0, 2, 4]]
    assert nested_edges(table, 4, range(5), minimum=2) == [[0, 4], [0, 2, 4]]
    assert total(table, [0, 3, 4]) == 1


def test_many_tables_at_once_give_what_each_gives_alone() -> None:
    tables = np.random.default_rng(0).standard_normal((2, 3, 8, 8))
    for n, edges in zip((2, 4), best_edges(tables, [2, 4], range(8), 1), strict=True):
        assert edges.shape == (2, 3, n + 1)
        for at in np.ndindex(2, 3):
            (alone,) = best_edges(tables[at], [n], range(8), 1)
            assert edges[at].tolist() == alone.tolist()
    (edges,) = best_edges(tables[0], [3], range(8), 1)
    alone = [total(table, each) for table, each in zip(tables[0], edges, strict=True)]
    assert total(tables[0], edges) == pytest.approx(alone)
