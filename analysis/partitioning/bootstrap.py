"""Whether cuts land in the same places if the groups are resampled.

    support = share of Bayesian bootstrap draws with a cut within one bin of a cut

A draw has weights Exp(1) on the groups, and unequal groups are paired.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from demerge.analysis.partitioning.map_reading import Reading, once
from demerge.analysis.similarity import group_weights_to_pairs, pair_weighted_gram
from demerge.conflict import Array, ConflictMap
from demerge.randomness import generator
from demerge.timesteps import Partition

DRAWS = 200


@dataclass(frozen=True, slots=True)
class CutSupport:
    """How often draws have a cut within one bin of this one, and the central 90 % of its draws.

    `low` and `high` are None for a cut that was not found on the map.
    """

    cut: int
    support: float
    low: int | None
    high: int | None


@once
def drawn_cuts(reading: Reading, n: int, method: str = "gradient") -> Array:
    """Return the inner cuts of 200 bootstrap draws, in timesteps, [200 n-1].

    They are fewer if `hierarchical` finds none in some draws.
    """
    map = reading.map
    weights = generator(map.origin.seed, "analysis-bootstrap").exponential(size=(DRAWS, map.M))
    K = pair_weighted_gram(map, group_weights_to_pairs(weights))
    (edges,) = reading.edges(reading.objective.table(K), [n], method)
    inner = edges[edges[:, -2] < edges[:, -1]][:, 1:-1]
    return np.asarray(np.array(map.edges, dtype=np.float64)[inner])


def support(map: ConflictMap, partition: Partition, draws: Array) -> list[CutSupport]:
    """Return the support of each cut of a partition in draws [S n-1]."""
    edges, rows = np.array(map.edges), []
    for k, cut in enumerate(partition.cuts):
        low = edges[np.searchsorted(edges, cut) - 1]
        high = edges[np.searchsorted(edges, cut, side="right")]
        near = ((draws >= low) & (draws <= high)).any(1).mean()
        a, b = np.quantile(draws[:, k], [0.05, 0.95], method="nearest")
        rows.append(CutSupport(cut, float(near), int(a), int(b)))
    return rows
