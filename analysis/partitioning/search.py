"""Contiguous partitions of N bins that maximise a sum over ranges, sum_R v(R), v in a table.

best_edges     the best partition into n ranges, exactly, by dynamic programming, O(n N^2), for
               several n and many tables [* N+1 N+1] at once
nested_edges   from one range on, the split that gains most, again and again: each partition refines
               the one before it, so that cuts for fewer ranges stay if more are wanted
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from demerge.conflict import Array
from demerge.errors import NumericalError

Edges = NDArray[np.intp]


def best_edges(
    table: Array, counts: Sequence[int], allowed: Sequence[int], minimum: int = 1
) -> list[Edges]:
    """Return the edges [* n+1] of the best partitions into n ranges, for each n of `counts`.

    Of partitions that are equally good it is the one of lower t.

    Args:
        table: value of the range of bins [a, b), [* N+1 N+1].
        allowed: indices where an edge may lie, ascending from 0 to N.
        minimum: least width of a range, in bins.
    """
    indices, edges = np.asarray(allowed), {}
    wide = indices[None, :] - indices[:, None] >= max(1, minimum)
    steps = np.where(wide, table[..., indices[:, None], indices[None, :]], -np.inf)
    best = np.broadcast_to(np.where(indices == indices[0], 0.0, -np.inf), steps.shape[:-1])
    came: list[Edges] = []
    for n in range(1, max(counts) + 1):
        totals = best[..., :, None] + steps
        came.append(totals.argmax(-2))
        best = totals.max(-2)
        if n not in counts:
            continue
        if not np.isfinite(best[..., -1]).all():
            raise no_partition(allowed, n, minimum)
        path = [np.full(best.shape[:-1], len(indices) - 1)]
        for step in reversed(came):
            path.append(np.take_along_axis(step, path[-1][..., None], -1)[..., 0])
        edges[n] = indices[np.stack(path[::-1], -1)]
    return [edges[n] for n in counts]


def nested_edges(table: Array, n: int, allowed: Sequence[int], minimum: int = 1) -> list[list[int]]:
    """Return the edges of nested partitions into 1, 2, ..., n ranges; fewer if none can be split.

    Each adds the one edge that gains most, table[a, c] + table[c, b] - table[a, b], to the one
    before it; of equals the one of lower t. Arguments as those of `best_edges`, table [N+1 N+1].
    """
    width, nested = max(1, minimum), [[int(allowed[0]), int(allowed[-1])]]
    while len(nested) < n:
        splits = [
            (table[a, c] + table[c, b] - table[a, b], -c)
            for a, b in pairwise(nested[-1])
            for c in allowed
            if c - a >= width and b - c >= width
        ]
        if not splits:
            break
        nested.append(sorted([*nested[-1], int(-max(splits)[1])]))
    return nested


def no_partition(allowed: Sequence[int], n: int, minimum: int) -> NumericalError:
    """Return the error that says that no such partition exists."""
    what = f"{len(allowed) - 1} blocks of bins give no {n} ranges of {minimum} bins or more"
    fix = "give fewer ranges or a smaller --minimum, measure more groups, or cut uniformly"
    return NumericalError(what, fix=fix)


def total(table: Array, edges: Edges | Sequence[int]) -> Array:
    """Return the sum [*] of table[a, b] over the ranges between edges [* n+1] or [n+1]."""
    edges = np.asarray(edges)
    starts, stops = edges[..., :-1], edges[..., 1:]
    if table.ndim == 2 or edges.ndim == 1:
        values: Array = table[..., starts, stops]
    else:
        values = table[np.arange(len(table))[:, None], starts, stops]
    sums: Array = values.sum(-1)
    return sums
