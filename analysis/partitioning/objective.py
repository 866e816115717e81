"""Partitions of [0, T) into ranges whose gradients conflict the most.

With weights w_i (the share of [0, T) that bin i covers) the mean gradient of a range is
gbar_R = sum_R w_i mu_i / w_R. Its square comes from K by 2-D prefix sums. What ranges gain over one
model for all, to first order,

    J(ranges) = sum_R v(R) - v([0, T))

    step       v(R) = w_R |gbar_R|                    an Adam-like step of fixed length
    energy     v(R) = w_R |gbar_R|^2                  a gradient step
    cosine     v(R) = (1/|R|) sum_{a,b in R} rho_ab   the same with all gradients scaled to length 1

is a sum over ranges, so that the best contiguous partition is exact by dynamic programming
(search.py). `step` is the default. K is the unbiased estimate of similarity.py, and v of a negative
square is 0. That kink makes `step` unsteady if gradients are near 0, as at a converged base.
`cosine` is smooth, and not ruled by the bins with the largest gradients as `energy` is.

Unresolved bins: their K is noise, and a program maximises noise gladly. Cuts lie between the blocks
of resolution.py only, and bins that `cosine` cannot scale weigh nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from demerge.analysis.partitioning.options import Method, Score
from demerge.analysis.partitioning.search import Edges, best_edges, nested_edges
from demerge.analysis.similarity import Similarity
from demerge.conflict import Array, ConflictMap
from demerge.errors import UsageError
from demerge.timesteps import Partition

METHODS: tuple[str, ...] = get_args(Method)
SCORES: tuple[str, ...] = get_args(Score)
ADAPTIVE = ("gradient", "hierarchical")  # look at the map


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """J as a function of K, for one map and score."""

    weights: Array  # w of each bin [N]
    scale: Array  # factor on each bin's gradient [N], the same for resampled K
    is_length: bool  # whether v is the length |gbar| and not its square

    @classmethod
    def of(cls, map: ConflictMap, score: str, bins: Similarity) -> Objective:
        """Choose weights and scale."""
        if score != "cosine":
            return cls(map.widths, np.ones(map.N), is_length=score == "step")
        resolved = bins.resolved
        scale = np.where(resolved, np.where(resolved, np.diagonal(bins.K), 1.0) ** -0.5, 0.0)
        return cls(resolved / max(1, resolved.sum()), scale, is_length=False)

    def table(self, K: Array) -> Array:
        """Return v of the bins [a, b) for all a <= b, [* N+1 N+1], from K [* N N]; 0 below."""
        u = self.weights * self.scale
        sums = np.cumsum(np.cumsum(K * np.outer(u, u), -2), -1)
        P = np.pad(sums, [(0, 0)] * (K.ndim - 2) + [(1, 0), (1, 0)])
        corners = np.diagonal(P, axis1=-2, axis2=-1)
        squares = corners[..., None, :] - P - P.swapaxes(-1, -2) + corners[..., :, None]
        if self.is_length:
            return np.triu(np.sqrt(np.clip(squares, 0, None)), 1)
        W = np.concatenate([[0], np.cumsum(self.weights)])
        widths = np.broadcast_to(np.clip(W[None, :] - W[:, None], 0, None), squares.shape)
        return np.triu(np.divide(squares, widths, out=np.zeros_like(squares), where=widths > 0), 1)


def adaptive_edges(
    table: Array, counts: Sequence[int], allowed: Sequence[int], method: str, minimum: int
) -> list[Edges]:
    """Return the edges [* n+1] that `gradient` or `hierarchical` finds in tables of v, for each n.

    If `hierarchical` can split no more, its last edge is repeated: those ranges are empty.
    """
    if method == "gradient":
        return best_edges(table, counts, allowed, minimum)
    rows = table.reshape(-1, *table.shape[-2:])
    nested = [nested_edges(each, max(counts), allowed, minimum) for each in rows]
    results = []
    for n in counts:
        edges = [row[min(n, len(row)) - 1] for row in nested]
        padded = [row + row[-1:] * (n + 1 - len(row)) for row in edges]
        results.append(np.array(padded, dtype=np.intp).reshape(*table.shape[:-2], n + 1))
    return results


def fixed_partition(map: ConflictMap, n: int, method: str) -> Partition:
    """Return n ranges of equal width in t (`uniform`) or in log SNR (`logsnr`)."""
    return FIXED[method](map, n)


def least_width(N: int) -> int:
    """Return the default least width of a range in bins: a twentieth of [0, T), for any n.

    Differs from the N // (2 n) of the literature: a least width that shrinks with n buys one narrow
    range with extra ones.
    """
    return -(-N // 20)


def equal_log_snr(map: ConflictMap, n: int) -> Partition:
    """Return n ranges of equal width in log SNR, each of at least one timestep."""
    levels = np.linspace(map.log_snr[0], map.log_snr[-1], n + 1)[1:-1]
    cuts = np.searchsorted(-map.log_snr, -levels)
    least = np.arange(1, n)
    cuts = np.maximum.accumulate(np.maximum(cuts, least) - least) + least
    return Partition.from_cuts(map.T, np.minimum(cuts, map.T - n + least).tolist())


FIXED: dict[str, Callable[[ConflictMap, int], Partition]] = {  # do not look at the map
    "uniform": lambda map, n: Partition.uniform(map.T, n),
    "logsnr": equal_log_snr,
}


def on_bins(map: ConflictMap, edges: Edges | Sequence[int]) -> Partition:
    """Return the partition whose ranges are the bins between `edges`, indices from 0 to N."""
    return Partition.from_cuts(map.T, [map.edges[i] for i in edges[1:-1]])


def nearest_edges(map: ConflictMap, partition: Partition) -> list[int]:
    """Return the edges of bins nearest to those of a partition, indices from 0 to N.

    A cut off the grid of bins averages two gradients in the bin that it splits. So it loses to
    cuts on the grid whatever the gradients are. Cuts are compared on these edges, like with like.
    Of two edges equally near it is the even one. Ranges that are too narrow to be seen vanish.
    """
    indices = np.interp(partition.cuts, map.edges, np.arange(map.N + 1))
    return sorted({0, *np.rint(indices).astype(int).tolist(), map.N})


def cover(map: ConflictMap, partition: Partition) -> Array:
    """Return the share of each bin that each range covers, [R N]."""
    edges = np.array(map.edges)
    low = np.array([span.start for span in partition])[:, None]
    high = np.array([span.stop for span in partition])[:, None]
    overlap = np.clip(np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1]), 0, None)
    return np.asarray(overlap / np.diff(edges))


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Check that a value is one of the choices."""
    if value not in choices:
        raise UsageError(f"{name} '{value}' is unknown", fix=f"use one of {', '.join(choices)}")
