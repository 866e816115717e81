"""Cutting [0, T) into ranges where the gradients conflict the most.

With weights w_i (the share of [0, T) that bin i covers) the mean gradient of a range is gbar_R = sum_R w_i mu_i / w_R, and its
square comes from K by 2-D prefix sums. What ranges gain over one model for all, to first order,

    J(ranges) = sum_R v(R) - v([0, T))

    step       v(R) = w_R |gbar_R|                      an Adam-like step of fixed length in each range; the default
    energy     v(R) = w_R |gbar_R|^2                    a gradient step
    cosine     v(R) = (1/|R|) sum_{a,b in R} rho_ab     the same with all bins' gradients scaled to length 1

is a sum over ranges, so that the best contiguous cut is exact by dynamic programming (search.py). K is the unbiased estimate
of similarity.py and v of a negative square is 0. That kink makes `step` unsteady where gradients are near 0, as at a converged
base; `cosine` is smooth, and not ruled by the bins with the largest gradients as `energy` is.

Unresolved bins: their K is noise, and a program maximises noise gladly. Cuts lie between the blocks of blocks.py only, and
bins that `cosine` cannot scale weigh nothing.

A partition off the grid of bins is valued by taking the gradient as constant within a bin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from demerge.analysis.partitioning.resolution import blocks
from demerge.analysis.partitioning.search import nested, no_cut, programs
from demerge.analysis.similarity import Similarity, similarity
from demerge.conflict import Array, ConflictMap
from demerge.errors import UsageError
from demerge.timesteps import Partition

FOUND = ("gradient", "hierarchical")
GIVEN = ("uniform", "logsnr")
METHODS = (*FOUND, *GIVEN)
SCORES = ("step", "energy", "cosine")


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """J as a function of K, for one map and score.

    Attributes:
        weights: w of each bin [N].
        scale: what each bin's gradient is multiplied by [N]; fixed, so that resampled K are scaled alike.
        root: whether v is the length |gbar| and not its square.
    """

    weights: Array
    scale: Array
    root: bool

    @classmethod
    def of(cls, map: ConflictMap, score: str, found: Similarity) -> Objective:
        """Choose weights and scale.

        Raises:
            UsageError: where the score is unknown.
        """
        if score not in SCORES:
            raise UsageError(f"score '{score}' is unknown", fix=f"use one of {', '.join(SCORES)}")
        if score != "cosine":
            return cls(map.widths, np.ones(map.N), root=score == "step")
        scale = np.where(
            found.resolved, np.where(found.resolved, np.diagonal(found.K), 1.0) ** -0.5, 0.0
        )
        return cls(found.resolved / max(1, found.resolved.sum()), scale, root=False)

    def values(self, sums: Array, weights: Array) -> Array:
        """Return v [*] from sums of w_a w_b K_ab over a range and its weight w_R, [*]."""
        if self.root:
            return np.sqrt(np.clip(sums, 0, None))
        v: Array = np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0)
        return v

    def table(self, K: Array) -> Array:
        """Return v of the range of bins [a, b) for all a <= b, [* N+1 N+1], from K [* N N]; 0 below the diagonal."""
        u = self.weights * self.scale
        P = np.pad(
            np.cumsum(np.cumsum(K * np.outer(u, u), -2), -1),
            [(0, 0)] * (K.ndim - 2) + [(1, 0), (1, 0)],
        )
        W = np.concatenate([[0], np.cumsum(self.weights)])
        corners = np.diagonal(P, axis1=-2, axis2=-1)
        sums = corners[..., None, :] - P - P.swapaxes(-1, -2) + corners[..., :, None]
        return np.triu(
            self.values(
                sums, np.broadcast_to(np.clip(W[None, :] - W[:, None], 0, None), sums.shape)
            ),
            1,
        )

    def gain(self, K: Array, cover: Array) -> Array:
        """Return J [*] for K [* N N] of ranges that cover the share c_rn of each bin, [R N]."""
        return self._total(K, cover) - self._total(K, np.ones((1, cover.shape[1])))

    def _total(self, K: Array, cover: Array) -> Array:
        u = cover * self.weights
        sums = np.einsum("rn,...nk,rk->...r", u * self.scale, K, u * self.scale, optimize=True)
        total: Array = self.values(sums, np.broadcast_to(u.sum(1), sums.shape)).sum(-1)
        return total


# -- ways to cut ---------------------------------------------------------------------------------------------------------


def cut(
    map: ConflictMap,
    n: int = 4,
    method: str = "gradient",
    *,
    score: str = "step",
    minimum: int | None = None,
) -> Partition:
    """Cut [0, T) into n ranges.

    Args:
        method: `gradient` (maximise J on the map), `hierarchical` (split where J gains most, again and again), `uniform`
            (equal widths), `logsnr` (equal widths in log SNR).
        score: `step`, `energy` or `cosine`, for methods that look at the map.
        minimum: least width of a range in bins, for these methods; None is `least_width`.

    Raises:
        UsageError: where an argument is out of its range.
        NumericalError: where noise leaves too little of the map to cut by: too few blocks, or less than half of [0, T).
    """
    if method not in METHODS:
        raise UsageError(f"method '{method}' is unknown", fix=f"use one of {', '.join(METHODS)}")
    if not 1 <= n <= map.T:
        raise UsageError(
            f"cannot cut {map.T} timesteps into {n} ranges", fix=f"give 1 <= n <= {map.T}"
        )
    if method == "uniform" or n == 1:
        return Partition.uniform(map.T, n)
    if method == "logsnr":
        return equal_log_snr(map, n)
    found, allowed = similarity(map), blocks(map).require_known().edges
    table = Objective.of(map, score, found).table(found.K)
    (edges,) = edges_of(table, [n], allowed, method, minimum)
    if len(edges) <= n:
        raise no_cut(allowed, n, least_width(map.N) if minimum is None else minimum)
    return on_bins(map, edges)


def edges_of(
    table: Array, counts: Sequence[int], allowed: Sequence[int], method: str, minimum: int | None
) -> list[list[int]]:
    """Return the edges of the cuts that `gradient` or `hierarchical` finds in a table of v, for each number of ranges.

    `hierarchical` returns its finest partition where it can split no more.

    Raises:
        NumericalError: where there is no cut for `gradient`.
    """
    width = least_width(len(table) - 1) if minimum is None else minimum
    if method == "gradient":
        return programs(table, counts, allowed, width)
    found = nested(table, max(counts), allowed, width)
    return [found[min(n, len(found)) - 1] for n in counts]


def least_width(N: int) -> int:
    """Return the default least width of a range in bins: those that cover a twentieth of [0, T), however many ranges.

    Differs from the N // (2 n) of the literature: a least width that shrinks with n buys one narrow range with extra ones.
    """
    return -(-N // 20)


def equal_log_snr(map: ConflictMap, n: int) -> Partition:
    """Cut [0, T) into n ranges of equal width in log SNR, each of at least one timestep."""
    levels = np.linspace(map.log_snr[0], map.log_snr[-1], n + 1)[1:-1]
    cuts = np.searchsorted(-map.log_snr, -levels)
    places = np.arange(1, n)
    cuts = np.maximum.accumulate(np.maximum(cuts, places) - places) + places
    return Partition.from_cuts(map.T, [int(c) for c in np.minimum(cuts, map.T - n + places)])


def on_bins(map: ConflictMap, edges: Sequence[int]) -> Partition:
    """Return the partition whose ranges are the bins between `edges`, indices from 0 to N."""
    return Partition.from_cuts(map.T, [map.edges[i] for i in edges[1:-1]])


def nearest_edges(map: ConflictMap, partition: Partition) -> list[int]:
    """Return the edges of bins nearest to those of a partition, indices from 0 to N.

    A cut off the grid of bins averages two gradients in the bin that it splits, and so loses to cuts on the grid whatever the
    gradients are. Cuts are compared on these edges, like with like. Of two edges equally near it is the even one; ranges
    that are too narrow to be seen vanish.
    """
    places = np.interp(partition.cuts, map.edges, np.arange(map.N + 1))
    return sorted({0, *(int(place) for place in np.rint(places)), map.N})


def cover(map: ConflictMap, partition: Partition) -> Array:
    """Return the share of each bin that each range covers, [R N]."""
    edges = np.array(map.edges)
    low, high = (
        np.array([getattr(r, side) for r in partition])[:, None] for side in ("start", "stop")
    )
    overlap = np.clip(np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1]), 0, None)
    shares: Array = overlap / np.diff(edges)
    return shares
