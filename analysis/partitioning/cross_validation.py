"""What cuts explain on samples that did not choose them, and how many ranges that supports.

For halves (A, B) of the groups, with the cut found on A and judged on B,

    ES_x(n) = mean over (A, B) of J_B(cut of K_A into n ranges) / J(blocks)
    gain    = ES_x of the cut found - ES_x of another one, on the same halves
    n*      = the fewest ranges with ES_x(n) >= ES_x(best) - SE(ES_x(best))

ES on the data that chose the cut rises with n, noise or not. ES_x stops where the halves no longer agree where to cut, and may
be negative; only it decides on n and on the advice. Errors are the jackknife's over groups, of the whole procedure: to halve,
to cut, to judge. They are 0.7 to 1.1 times the spread over planted maps; those of similarity.py hold for a fixed cut, and
are half of it. J(blocks) alone is that of all groups: errors of the ratio vanish if all blocks are apart, and then let noise
choose n (on planted ranges 1 map in 8 had 8 for 2; none had so).

Cuts that do not look at the map are judged on the same halves B, and all cuts at edges of bins: a uniform cut off the grid at
the nearest ones. Otherwise a cut found on the grid would win by the bins that uniform splits.

Where gradients turn smoothly with t, each range more does gain something, and n* grows with the samples; what a range costs,
an expert to train, is not in it. So 10 is the most that is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from demerge.analysis.partitioning.bootstrap import Estimate, Evidence
from demerge.analysis.partitioning.objective import (
    FOUND,
    GIVEN,
    METHODS,
    cut,
    least_width,
    nearest_edges,
)
from demerge.analysis.partitioning.resolution import LEAST_KNOWN
from demerge.analysis.partitioning.search import no_cut, total
from demerge.analysis.similarity import halves, kernel, standard_error, weighted
from demerge.conflict import Array, ConflictMap
from demerge.errors import NumericalError, UsageError
from demerge.timesteps import Partition

MOST = 10


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """The halves of a map's groups, and J on them as a share of the conflict.

    Attributes:
        evidence: the map with its score.
        splits: K_A and K_B [S N N], of all groups and then without each group, 1 + M pairs.
        conflict: J of all blocks apart, of all groups.
    """

    evidence: Evidence
    splits: tuple[tuple[Array, Array], ...]
    conflict: float

    @classmethod
    def of(cls, evidence: Evidence) -> HeldOut:
        """Halve the groups."""
        map, everyone = evidence.map, list(range(evidence.map.M))
        kept = [everyone, *([g for g in everyone if g != m] for m in everyone)]
        pairs = [halves(groups, map.M, map.origin.seed) for groups in kept]
        splits = tuple((kernel(map, weighted(A)), kernel(map, weighted(B))) for A, B in pairs)
        return cls(
            evidence, splits, float(evidence.objective.gain(evidence.found.K, evidence.apart))
        )

    def gains(
        self, counts: Sequence[int], method: str = "gradient", minimum: int | None = None
    ) -> Array:
        """Return the mean J_B of cuts into n ranges for each n, of all groups and without each, [1+M C]."""
        if method in FOUND:
            return self._judged(lambda A: self.evidence.edges(A, counts, method, minimum))
        fixed = [
            nearest_edges(self.evidence.map, cut(self.evidence.map, n, method)) for n in counts
        ]
        return self._judged(lambda A: fixed)

    def given(self, partition: Partition) -> Array:
        """Return the mean J_B of one partition at the nearest edges of bins, of all groups and without each, [1+M]."""
        edges = nearest_edges(self.evidence.map, partition)
        return self._judged(lambda A: [edges])[:, 0]

    def _judged(self, find: Callable[[Array], list[list[int]]]) -> Array:
        """Return the mean J_B of the cuts that `find` makes of each K_A, of all groups and without each, [1+M C]."""
        table = self.evidence.objective.table
        rows = []
        for A, B in self.splits:
            split = [
                [total(judge, edges) - judge[0, -1] for edges in find(a)]
                for a, judge in zip(A, table(B), strict=True)
            ]
            rows.append(np.mean(split, axis=0))
        return np.array(rows)

    def share(self, gains: Array) -> Estimate:
        """Return gains [1+M] as a share of the conflict, with the jackknife's error."""
        shares = gains / self.conflict
        return Estimate(float(shares[0]), float(standard_error(shares[1:])))


# -- how many ranges -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Count:
    """How many ranges a map supports.

    Attributes:
        chosen: n*.
        reason: why, in words.
        shares: ES_x for 1, 2, ... ranges by method: one that looks at the map, and those that do not.
    """

    chosen: int
    reason: str
    shares: dict[str, list[Estimate]]


def count(
    map: ConflictMap, *, method: str = "gradient", score: str = "step", minimum: int | None = None
) -> Count:
    """Find how many ranges a map supports by cross-fit and the one-SE rule; 1 where no conflict is resolved.

    Raises:
        UsageError: where a score or method is unknown.
        NumericalError: where the map is not as wide as `minimum`.
    """
    if method not in METHODS:
        raise UsageError(f"method '{method}' is unknown", fix=f"use one of {', '.join(METHODS)}")
    evidence = Evidence.of(map, score)
    if not evidence.sure:
        return Count(1, unsure(evidence), {})
    looks = method if method in FOUND else "gradient"
    held_out, counts, shares = HeldOut.of(evidence), _counts(evidence, looks, minimum), {}
    for each in (looks, *GIVEN):
        gains = held_out.gains(counts, each, minimum)
        shares[each] = [held_out.share(column) for column in gains.T]
    if len(counts) == 1:
        width = least_width(map.N) if minimum is None else minimum
        return Count(1, no_cut(evidence.blocks.edges, 2, width).what, shares)
    return Count(*one_se(shares[method]), shares)


def one_se(shares: Sequence[Estimate]) -> tuple[int, str]:
    """Return the fewest ranges whose share, the k-th for k+1 ranges, is within one SE of the best, and why."""
    best = max(range(len(shares)), key=lambda k: shares[k].value)
    limit = shares[best].value - shares[best].se
    chosen = next(k for k, share in enumerate(shares) if share.value >= limit)
    if best == 0:
        return 1, "on held-out groups no cut explains anything"
    ties = "the best" if chosen == best else f"the fewest within one SE of the best, {best + 1}"
    most = f"; {MOST} is the most that is tried" if best + 1 == MOST else ""
    return chosen + 1, f"by cross-fit {ties} (explains {shares[best]} on held-out groups){most}"


def unsure(evidence: Evidence) -> str:
    """Say why a map that is not sure of its conflict has nothing to cut by."""
    if evidence.blocks.known < LEAST_KNOWN:
        return f"gradients are resolved on {evidence.blocks.known:.0%} of [0, T), and a cut needs {LEAST_KNOWN:.0%}"
    return "no conflict between bins is resolved"


def _counts(evidence: Evidence, method: str, minimum: int | None) -> list[int]:
    """Return 1, 2, ... as far as a method can cut the map, but no further than its bins and 10."""
    evidence.edges(
        evidence.found.K, [1], method, minimum
    )  # raises where not even one range is wide enough
    counts = [1]
    for n in range(2, min(MOST, evidence.map.N) + 1):
        try:
            finest = evidence.edges(evidence.found.K, [n], method, minimum)[0]
        except NumericalError:
            break
        if len(finest) <= n:
            break
        counts.append(n)
    return counts
