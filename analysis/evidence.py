"""How far a cut is to be believed: explained share with errors, held-out gain, stability under resampling.

    ES(ranges) = J(ranges) / J(blocks)           1: the ranges lose nothing of what all blocks apart would gain
    held out   = mean over halves (A, B) of [J_B(cut on A) - J_B(other)] / J(blocks)
    support    = share of Bayesian bootstrap draws over groups (weights Exp(1), unequal groups paired) with a cut within a bin

ES of a cut on the data that chose it flatters the cut; the held-out gain does not, and alone decides the advice. Blocks and
the scales of bins are those of the whole map. Errors are the jackknife's over groups, of the whole procedure where a cut is
found anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from demerge.analysis.blocks import LEAST_KNOWN, Blocks, blocks
from demerge.analysis.segmentation import METHODS, Objective, cover, cut, least_width, on_bins, program
from demerge.analysis.similarity import (
    RESOLVED,
    Similarity,
    halves,
    kernel,
    leave_one_out,
    similarity,
    standard_error,
    weighted,
)
from demerge.conflict import Array, ConflictMap
from demerge.errors import NumericalError
from demerge.randomness import generator
from demerge.timesteps import Partition

DRAWS = 200


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its standard error."""

    value: float
    se: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.se:.3f}"

    def above(self, factor: float) -> bool:
        """Whether the value lies more than `factor` standard errors above 0."""
        return self.value > factor * self.se


def estimate(map: ConflictMap, statistic: Callable[[Array], Array], K: Array) -> Estimate:
    """Return statistic(K) with the jackknife's error; it takes [* N N] and gives [*]."""
    return Estimate(float(statistic(K)), float(standard_error(statistic(leave_one_out(map)))))


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """A map with one score, and what it says about cuts."""

    map: ConflictMap
    score: str
    found: Similarity
    objective: Objective
    blocks: Blocks

    @classmethod
    def of(cls, map: ConflictMap, score: str = "cosine") -> Evidence:
        """Prepare what all questions share."""
        found = similarity(map)
        return cls(map, score, found, Objective.of(map, score, found), blocks(map))

    @property
    def apart(self) -> Array:
        """The blocks as ranges of bins, [R N]."""
        return cover(self.map, on_bins(self.map, self.blocks.edges))

    @property
    def conflict(self) -> Estimate:
        """J of all blocks apart, the most that a cut between them can gain."""
        return estimate(self.map, lambda K: self.objective.gain(K, self.apart), self.found.K)

    @property
    def sure(self) -> bool:
        """Whether there is a conflict to explain, on the larger part of [0, T)."""
        return self.blocks.known >= LEAST_KNOWN and self.conflict.above(RESOLVED)

    def share(self, partition: Partition) -> Estimate:
        """Return ES of a partition."""
        shares = cover(self.map, partition)
        return estimate(self.map, lambda K: self.objective.gain(K, shares) / self.objective.gain(K, self.apart), self.found.K)

    def best(self, K: Array, n: int) -> Partition:
        """Return the best cut of K [N N] into n ranges between the map's blocks."""
        return on_bins(self.map, program(self.objective.table(K), n, self.blocks.edges, least_width(self.map, n)))

    def held_out_gain(self, n: int, method: str) -> Estimate:
        """Return how much more of J the cut of one half of the groups explains on the other half than `method` does."""
        M, other = self.map.M, cover(self.map, cut(self.map, n, method))
        whole = self._held_out(list(range(M)), n, other)
        without = [self._held_out([g for g in range(M) if g != m], n, other) for m in range(M)]
        return Estimate(whole, float(standard_error(np.array(without))))

    def _held_out(self, groups: list[int], n: int, other: Array) -> float:
        first, second = (kernel(self.map, weighted(h)) for h in halves(groups, self.map.M, self.map.origin.seed))
        gains = [
            self.objective.gain(b, cover(self.map, self.best(a, n))) - self.objective.gain(b, other)
            for a, b in zip(first, second, strict=True)
        ]
        return float(np.mean(gains)) / self.conflict.value

    def bootstrap(self, n: int) -> Array:
        """Return the inner cuts of 200 bootstrap draws, in timesteps, [200 n-1]."""
        weights = generator(self.map.origin.seed, "analysis-bootstrap").exponential(size=(DRAWS, self.map.M))
        return np.array([self.best(K, n).cuts for K in kernel(self.map, weighted(weights))], dtype=np.float64)


def support(map: ConflictMap, partition: Partition, draws: Array) -> list[tuple[int, float, int, int]]:
    """Return for each cut: its timestep, the share of draws with a cut within one bin, and the central 90 % of its draws."""
    result = []
    for k, place in enumerate(partition.cuts):
        i = map.edges.index(place)
        low, high = map.edges[max(0, i - 1)], map.edges[min(map.N, i + 1)]
        near = ((draws >= low) & (draws <= high)).any(1).mean()
        a, b = np.quantile(draws[:, k], [0.05, 0.95], method="nearest")
        result.append((place, float(near), int(a), int(b)))
    return result


def curve(evidence: Evidence, counts: Iterable[int]) -> pd.DataFrame:
    """Return ES of every method for each number of ranges it can cut into: columns method, ranges, share, se."""
    rows = []
    for method in METHODS:
        for n in counts:
            try:
                found = evidence.share(cut(evidence.map, n, method, score=evidence.score))
            except NumericalError:
                break
            rows.append((method, n, found.value, found.se))
    return pd.DataFrame(rows, columns=["method", "ranges", "share", "se"])
