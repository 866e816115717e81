"""Contiguous partitions of N bins that make a sum over ranges large, sum_R v(R) with v in a table [N+1 N+1].

program     the best partition into n ranges, exactly, by dynamic programming, O(n N^2); `programs` for several n at once
nested      from one range on, the split that gains most, again and again: each partition refines the one before it, so that
            cuts for fewer ranges stay when more are wanted. Never better than the program at the same least width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from demerge.conflict import Array
from demerge.errors import NumericalError


def program(table: Array, n: int, allowed: Sequence[int], minimum: int = 1) -> list[int]:
    """Return the n + 1 edges that maximise the sum of table[a, b] over ranges, exactly; of equals those of lower t.

    See `programs` for the arguments.
    """
    return programs(table, [n], allowed, minimum)[0]


def programs(
    table: Array, counts: Sequence[int], allowed: Sequence[int], minimum: int = 1
) -> list[list[int]]:
    """Return the edges of the best partitions into n ranges for each n, of one dynamic program.

    Args:
        table: value of the range [a, b), [N+1 N+1].
        allowed: indices where an edge may lie, ascending from 0 to N.
        minimum: least width of a range, in bins.

    Raises:
        NumericalError: where no such cut exists.
    """
    edges, found = np.asarray(allowed), {}
    steps = np.where(
        edges[None, :] - edges[:, None] >= max(1, minimum), table[np.ix_(edges, edges)], -np.inf
    )
    best = np.where(np.arange(len(edges)) == 0, 0.0, -np.inf)
    came: list[NDArray[np.intp]] = []
    for n in range(1, max(counts) + 1):
        totals = best[:, None] + steps
        came.append(totals.argmax(0))
        best = totals.max(0)
        if n not in counts:
            continue
        if not np.isfinite(best[-1]):
            raise no_cut(allowed, n, minimum)
        path = [len(edges) - 1]
        for step in reversed(came):
            path.append(int(step[path[-1]]))
        found[n] = [int(edges[i]) for i in reversed(path)]
    return [found[n] for n in counts]


def nested(table: Array, n: int, allowed: Sequence[int], minimum: int = 1) -> list[list[int]]:
    """Return the edges of nested partitions into 1, 2, ..., n ranges; fewer where no range can be split any more.

    Each is the one before it with the one edge more that gains most, table[a, c] + table[c, b] - table[a, b]; of equals the one
    of lower t. Arguments as those of `program`.
    """
    found = [[int(allowed[0]), int(allowed[-1])]]
    while len(found) < n:
        gains = [
            (table[a, c] + table[c, b] - table[a, b], -c)
            for a, b in pairwise(found[-1])
            for c in allowed
            if c - a >= max(1, minimum) and b - c >= max(1, minimum)
        ]
        if not gains:
            break
        found.append(sorted([*found[-1], int(-max(gains)[1])]))
    return found


def no_cut(allowed: Sequence[int], n: int, minimum: int) -> NumericalError:
    """Return the error that says that no such cut exists."""
    return NumericalError(
        f"{len(allowed) - 1} blocks of bins give no {n} ranges of {minimum} bins or more",
        fix="give fewer ranges or a smaller --minimum, measure more groups, or take the uniform cut",
    )


def total(table: Array, edges: Sequence[int]) -> float:
    """Return the sum of table[a, b] over the ranges between edges."""
    return float(table[list(edges[:-1]), list(edges[1:])].sum())
