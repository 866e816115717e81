"""How far a cut is to be believed: explained share with errors, stability under resampling.

    ES(ranges) = J(ranges) / J(blocks)           0: no more than one range; 1: nothing lost of what all blocks apart would gain
    support    = share of Bayesian bootstrap draws over groups (weights Exp(1), unequal groups paired) with a cut within a bin

ES does not change with the length of the gradients, so that it can be compared between models; noise can carry its estimate
out of [0, 1], where it is cut off. ES of a cut on the data that chose it flatters the cut: see crossfit.py. Blocks and the
scales of bins are those of the whole map. Errors are those of similarity.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from demerge.analysis.partitioning.objective import (
    METHODS,
    Objective,
    cover,
    cut,
    edges_of,
    nearest_edges,
    on_bins,
)
from demerge.analysis.partitioning.resolution import LEAST_KNOWN, Blocks, blocks
from demerge.analysis.similarity import (
    RESOLVED,
    Similarity,
    error,
    kernel,
    similarity,
    weighted,
    without_pair,
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


def short(value: float) -> float | None:
    """Return a number for JSON, of six digits; None where it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def estimate(map: ConflictMap, statistic: Callable[[Array], Array], K: Array) -> Estimate:
    """Return statistic(K) with its error; it takes [* N N] and gives [*]."""
    return Estimate(float(statistic(K)), float(error(statistic(without_pair(map))).se))


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """A map with one score, and what it says about cuts."""

    map: ConflictMap
    score: str
    found: Similarity
    objective: Objective
    blocks: Blocks

    @classmethod
    def of(cls, map: ConflictMap, score: str = "step") -> Evidence:
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
        """Return ES of a partition, in [0, 1], at the nearest edges of bins."""
        shares = cover(self.map, on_bins(self.map, nearest_edges(self.map, partition)))
        found = estimate(
            self.map,
            lambda K: self.objective.gain(K, shares) / self.objective.gain(K, self.apart),
            self.found.K,
        )
        return Estimate(float(np.clip(found.value, 0, 1)), found.se)

    def edges(
        self, K: Array, counts: Sequence[int], method: str = "gradient", minimum: int | None = None
    ) -> list[list[int]]:
        """Return the edges of the best cuts of K [N N] between the map's blocks, for each number of ranges."""
        return edges_of(self.objective.table(K), counts, self.blocks.edges, method, minimum)

    def bootstrap(self, n: int, method: str = "gradient", minimum: int | None = None) -> Array:
        """Return the inner cuts of 200 bootstrap draws, in timesteps, [200 n-1]; fewer where `hierarchical` finds none."""
        weights = generator(self.map.origin.seed, "analysis-bootstrap").exponential(
            size=(DRAWS, self.map.M)
        )
        cuts = [
            self.edges(K, [n], method, minimum)[0][1:-1]
            for K in kernel(self.map, weighted(weights))
        ]
        places = np.array(self.map.edges, dtype=np.float64)
        return places[
            np.array([inner for inner in cuts if len(inner) == n - 1], dtype=np.intp).reshape(
                -1, n - 1
            )
        ]


def support(
    map: ConflictMap, partition: Partition, draws: Array
) -> list[tuple[int, float, int, int]]:
    """Return for each cut: its timestep, the share of draws with a cut within one bin, and the central 90 % of its draws."""
    edges, result = np.array(map.edges), []
    for k, place in enumerate(partition.cuts):
        low, high = (
            edges[np.searchsorted(edges, place) - 1],
            edges[np.searchsorted(edges, place, side="right")],
        )
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
