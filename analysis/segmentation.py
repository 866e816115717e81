"""Cutting [0, T) into ranges where the gradients conflict the most.

With weights w_i (the share of [0, T) that bin i covers) the mean gradient of a range is gbar_R = sum_R w_i mu_i / w_R, and its
square comes from K by 2-D prefix sums. What ranges gain over one model for all, to first order,

    J(ranges) = sum_R v(R) - v([0, T))

    step       v(R) = w_R |gbar_R|                      an Adam-like step of fixed length in each range
    energy     v(R) = w_R |gbar_R|^2                    a gradient step
    cosine     v(R) = (1/|R|) sum_{a,b in R} rho_ab     the same with all bins' gradients scaled to length 1; the default

is a sum over ranges, so that the best contiguous cut is exact by dynamic programming in O(n N^2). K is the unbiased estimate
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
from numpy.typing import NDArray

from demerge.analysis.blocks import blocks
from demerge.analysis.similarity import Similarity, similarity
from demerge.conflict import Array, ConflictMap
from demerge.errors import NumericalError, UsageError
from demerge.timesteps import Partition

METHODS = ("gradient", "uniform", "logsnr")
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
        scale = np.where(found.resolved, np.where(found.resolved, np.diagonal(found.K), 1.0) ** -0.5, 0.0)
        return cls(found.resolved / max(1, found.resolved.sum()), scale, root=False)

    def values(self, sums: Array, weights: Array) -> Array:
        """Return v [*] from sums of w_a w_b K_ab over a range and its weight w_R, [*]."""
        if self.root:
            return np.sqrt(np.clip(sums, 0, None))
        v: Array = np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0)
        return v

    def table(self, K: Array) -> Array:
        """Return v of the range of bins [a, b) for all a <= b, [N+1 N+1]; 0 below the diagonal."""
        u = self.weights * self.scale
        P = np.pad(np.cumsum(np.cumsum(K * np.outer(u, u), 0), 1), ((1, 0), (1, 0)))
        W = np.concatenate([[0], np.cumsum(self.weights)])
        corners = np.diagonal(P)
        sums = corners[None, :] - P - P.T + corners[:, None]
        return np.triu(self.values(sums, np.clip(W[None, :] - W[:, None], 0, None)), 1)

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
    map: ConflictMap, n: int = 4, method: str = "gradient", *, score: str = "cosine", minimum: int | None = None
) -> Partition:
    """Cut [0, T) into n ranges.

    Args:
        method: `gradient` (maximise J on the map), `uniform` (equal widths), `logsnr` (equal widths in log SNR).
        score: `step`, `energy` or `cosine`, for `gradient`.
        minimum: least width of a range in bins, for `gradient`; None is N // (2 n).

    Raises:
        UsageError: where an argument is out of its range.
        NumericalError: where noise leaves too little for `gradient` to cut by: too few blocks, or less than half of [0, T).
    """
    if method not in METHODS:
        raise UsageError(f"method '{method}' is unknown", fix=f"use one of {', '.join(METHODS)}")
    if not 1 <= n <= map.T:
        raise UsageError(f"cannot cut {map.T} timesteps into {n} ranges", fix=f"give 1 <= n <= {map.T}")
    if method == "uniform" or n == 1:
        return Partition.uniform(map.T, n)
    if method == "logsnr":
        return equal_log_snr(map, n)
    found, allowed = similarity(map), blocks(map).require_known().edges
    table = Objective.of(map, score, found).table(found.K)
    return on_bins(map, program(table, n, allowed, least_width(map, n) if minimum is None else minimum))


def least_width(map: ConflictMap, n: int) -> int:
    """Return the default least width of a range in bins."""
    return max(1, map.N // (2 * n))


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


def program(table: Array, n: int, allowed: Sequence[int], minimum: int = 1) -> list[int]:
    """Return the n + 1 edges that maximise the sum of table[a, b] over ranges, exactly; of equals those of lower t.

    Args:
        table: value of the range [a, b), [N+1 N+1].
        allowed: indices where an edge may lie, ascending from 0 to N.
        minimum: least width of a range, in bins.

    Raises:
        NumericalError: where no such cut exists.
    """
    edges = np.asarray(allowed)
    steps = np.where(edges[None, :] - edges[:, None] >= max(1, minimum), table[np.ix_(edges, edges)], -np.inf)
    best = np.where(np.arange(len(edges)) == 0, 0.0, -np.inf)
    came: list[NDArray[np.intp]] = []
    for _ in range(n):
        totals = best[:, None] + steps
        came.append(totals.argmax(0))
        best = totals.max(0)
    if not np.isfinite(best[-1]):
        raise NumericalError(
            f"{len(edges) - 1} blocks of bins give no {n} ranges of {minimum} bins or more",
            fix="measure more groups or larger batches, or take the uniform cut",
        )
    path = [len(edges) - 1]
    for step in reversed(came):
        path.append(int(step[path[-1]]))
    return [int(edges[i]) for i in reversed(path)]


def cover(map: ConflictMap, partition: Partition) -> Array:
    """Return the share of each bin that each range covers, [R N]."""
    edges = np.array(map.edges)
    low, high = (np.array([getattr(r, side) for r in partition])[:, None] for side in ("start", "stop"))
    overlap = np.clip(np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1]), 0, None)
    shares: Array = overlap / np.diff(edges)
    return shares
