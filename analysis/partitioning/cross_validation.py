"""What partitions explain on samples that did not choose them, and how many ranges that supports.

For halves (A, B) of the groups, with the partition found on A and judged on B,

    ES_x(n) = mean over (A, B) of J_B(partition of K_A into n ranges) / J(blocks)
    gain    = ES_x of the partition found - ES_x of another one, on the same halves
    n*      = the fewest ranges with ES_x(n) >= ES_x(best) - SE(ES_x(best))

ES on the data that chose the partition rises with n, noise or not. ES_x stops if the halves no
longer agree where to cut, and may be negative. Only it decides on n and on the advice. Errors are
the jackknife's over groups, of the whole procedure: to halve, to cut, to judge. They are 0.7 to 1.1
times the spread over planted maps. Those of similarity.py hold for a fixed partition, and are half
of it. J(blocks) alone is that of all groups: errors of the ratio vanish if all blocks are apart,
and then let noise choose n (on planted ranges 1 map in 8 had 8 for 2; none had so).

Methods that do not look at the map are judged on the same halves B, and all cuts at edges of bins:
a uniform cut off the grid at the nearest ones. Otherwise a cut found on the grid would win by the
bins that uniform splits.

If gradients turn smoothly with t, each range more does gain something, and n* grows with the
samples. What a range costs, an expert to train, is not in it. So 10 is the most that is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from demerge.analysis.partitioning.map_reading import Reading, once
from demerge.analysis.partitioning.objective import (
    ADAPTIVE,
    FIXED,
    METHODS,
    check_choice,
    fixed_partition,
    nearest_edges,
)
from demerge.analysis.partitioning.search import Edges, no_partition, total
from demerge.analysis.similarity import (
    Estimate,
    group_weights_to_pairs,
    halves,
    pair_weighted_gram,
    standard_error,
)
from demerge.conflict import Array, ConflictMap
from demerge.errors import NumericalError
from demerge.timesteps import Partition

MOST = 10


@once
def halved(reading: Reading) -> list[tuple[Array, Array]]:
    """Return K_A and K_B [S N N] of the halves of all groups, then of those without each group."""
    map, everyone = reading.map, list(range(reading.map.M))
    splits = []
    for groups in (everyone, *([g for g in everyone if g != m] for m in everyone)):
        weights = halves(groups, map.M, map.origin.seed)
        K_A, K_B = (pair_weighted_gram(map, group_weights_to_pairs(half)) for half in weights)
        splits.append((K_A, K_B))
    return splits


@once
def held_out_edges(reading: Reading, counts: tuple[int, ...], method: str) -> list[list[Edges]]:
    """Return the edges [S n+1] found on the halves A for each n, of all groups and without each."""
    table = reading.objective.table
    return [reading.edges(table(K_A), counts, method) for K_A, _ in halved(reading)]


@once
def held_out_gains(reading: Reading, counts: tuple[int, ...], method: str = "gradient") -> Array:
    """Return the mean J_B of partitions into n ranges for each n, of all groups and without each.

    Returns [1+M C].
    """
    if method in ADAPTIVE:
        return _judged(reading, held_out_edges(reading, counts, method))
    map = reading.map
    edges = [nearest_edges(map, fixed_partition(map, n, method)) for n in counts]
    return _judged(reading, [edges] * (map.M + 1))


def held_out_gain(reading: Reading, partition: Partition) -> Array:
    """Return the mean J_B of one partition, of all groups and without each, [1+M]."""
    edges = nearest_edges(reading.map, partition)
    return _judged(reading, [[edges]] * (reading.map.M + 1))[:, 0]


def _judged(reading: Reading, edges: Sequence[Sequence[Edges | Sequence[int]]]) -> Array:
    rows = []
    for (_, K_B), chosen in zip(halved(reading), edges, strict=True):
        table = reading.objective.table(K_B)
        rows.append([(total(table, each) - table[:, 0, -1]).mean() for each in chosen])
    return np.array(rows)


def held_out_share(reading: Reading, gains: Array) -> Estimate:
    """Return gains [1+M] as a share of the conflict, with the jackknife's error."""
    shares = gains / reading.conflict.value
    return Estimate(float(shares[0]), float(standard_error(shares[1:])))


@dataclass(frozen=True, slots=True)
class RangeCount:
    """How many ranges a map supports."""

    chosen: int  # n*
    reason: str  # why, in words
    shares: dict[str, list[Estimate]]  # ES_x for 1, 2, ... ranges by method


@once
def cross_validation(reading: Reading, method: str = "gradient") -> RangeCount:
    """Find how many ranges a map supports, by the one-SE rule; 1 if no conflict is resolved."""
    check_choice("method", method, METHODS)
    if not reading.is_sure:
        return RangeCount(1, reading.doubt, {})
    adaptive = method if method in ADAPTIVE else "gradient"
    counts, shares = _counts(reading, adaptive), {}
    for each in (adaptive, *FIXED):
        gains = held_out_gains(reading, counts, each)
        shares[each] = [held_out_share(reading, column) for column in gains.T]
    if len(counts) == 1:
        reason = no_partition(reading.blocks.edges, 2, reading.least_width).what
        return RangeCount(1, reason, shares)
    return RangeCount(*one_se(shares[method]), shares)


def count_ranges(
    map: ConflictMap, *, method: str = "gradient", score: str = "step", minimum: int | None = None
) -> RangeCount:
    """Find how many ranges a map supports: `cross_validation` of its reading."""
    return cross_validation(Reading(map, score, minimum), method)


def one_se(shares: Sequence[Estimate]) -> tuple[int, str]:
    """Return the fewest ranges whose share is within one SE of the best, and why.

    The k-th share is that of k + 1 ranges.
    """
    best = max(range(len(shares)), key=lambda k: shares[k].value)
    if best == 0:
        return 1, "on held-out groups no cut explains anything"
    limit = shares[best].value - shares[best].se
    chosen = next(k for k, share in enumerate(shares) if share.value >= limit)
    ties = "the best" if chosen == best else f"the fewest within one SE of the best, {best + 1}"
    most = f"; {MOST} is the most that is tried" if best + 1 == MOST else ""
    return chosen + 1, f"by cross-fit {ties} (explains {shares[best]} on held-out groups){most}"


def _counts(reading: Reading, method: str) -> tuple[int, ...]:
    """Return 1, 2, ... as far as a method can cut the map, at most its bins and 10."""
    table, counts = reading.tables[0], [1]
    reading.edges(table, [1], method)  # raises if not even one range is wide enough
    for n in range(2, min(MOST, reading.map.N) + 1):
        try:
            (finest,) = reading.edges(table, [n], method)
        except NumericalError:
            break
        if finest[-2] == finest[-1]:
            break
        counts.append(n)
    return tuple(counts)


@once
def gains_over_fixed(
    reading: Reading, partition: Partition, method: str = "given"
) -> dict[str, Estimate]:
    """Return how much more of J a partition explains than each fixed one, on held-out groups.

    A `given` partition was chosen elsewhere, and is judged as it is.
    """

    def gains_of(method: str) -> Array:
        return held_out_gains(reading, (len(partition),), method)[:, 0]

    gains = held_out_gain(reading, partition) if method == "given" else gains_of(method)
    return {other: held_out_share(reading, gains - gains_of(other)) for other in FIXED}
