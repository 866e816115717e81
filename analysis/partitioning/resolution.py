"""Blocks of bins that noise leaves to be told apart: cuts lie between them only.

A resolved bin (K_ii > 3 SE) is a block. A run of unresolved bins is merged from low t on into
blocks whose mean gradient is resolved, |gbar|^2 > 3 SE. What stays open at the end of the run joins
the last of them, or is one unresolved block if there is none. So no cut separates two unresolved
bins. If the resolved blocks cover less than half of [0, T), a cut would follow what could be
measured and not what conflicts, and none is made.

How many groups would resolve a bin follows from the noise that was seen. K_ii is a U-statistic of
pairs of groups, and its variance at M groups is

    Var(M) = [4 (M - 2) sigma_1^2 + 2 sigma_2^2] / (M (M - 1)),

sigma_2^2 that of one pair <s_i^m, s_i^n>, sigma_1^2 <= sigma_2^2 / 2 that of its mean over n. The
first comes from all pairs, the second from the SE at the M that were measured. The signal is itself
uncertain: if K_ii is below its SE, the SE takes its place, and the number is a lower bound.

Paper: Hoeffding, A class of statistics with asymptotically normal distribution, 1948.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from demerge.analysis.similarity import RESOLVED, Similarity, estimate_error
from demerge.conflict import Array, ConflictMap
from demerge.errors import NumericalError

LEAST_KNOWN = 0.5
MOST_GROUPS = 100_000


@dataclass(frozen=True, slots=True)
class Resolution:
    """Contiguous blocks of bins."""

    edges: tuple[int, ...]  # indices of bins from 0 to N, one more than there are blocks
    known: float  # the share of [0, T) that resolved blocks cover

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def is_enough(self) -> bool:
        """Whether resolved blocks cover half of [0, T)."""
        return self.known >= LEAST_KNOWN

    @property
    def reason(self) -> str:
        """What is resolved and what a cut needs, in words."""
        known = f"gradients stand out from noise on {self.known:.0%} of the timesteps only"
        return f"{known}, and a boundary needs {LEAST_KNOWN:.0%}"

    def check(self) -> None:
        """Check that there is enough to cut by."""
        if not self.is_enough:
            fix = "measure more groups or larger batches, or cut uniformly"
            raise NumericalError(self.reason, fix=fix)


def resolution(K: Array, pairs: Array, widths: Array) -> Resolution:
    """Find the finest blocks of a map, from K [N N], K without each pair [P N N] and w [N]."""
    N = len(K)

    def is_resolved(start: int, stop: int) -> bool:
        inside = slice(start, stop)
        w = widths[inside]
        error = estimate_error(pairs[:, inside, inside] @ w @ w)
        return bool(w @ K[inside, inside] @ w > RESOLVED * error.se)

    edges = [0]
    for single, run in groupby(range(N), lambda i: is_resolved(i, i + 1)):
        bins = list(run)
        if single:
            edges += [i + 1 for i in bins]
        else:
            edges += _merged(bins[0], bins[-1] + 1, is_resolved)
    known = sum(widths[a:b].sum() for a, b in pairwise(edges) if is_resolved(a, b))
    return Resolution(tuple(edges), float(known))


def _merged(start: int, stop: int, is_resolved: Callable[[int, int], bool]) -> list[int]:
    """Return the ends of the resolved blocks of a run of bins; the last is stretched to `stop`."""
    ends: list[int] = []
    for end in range(start + 1, stop + 1):
        if is_resolved(ends[-1] if ends else start, end):
            ends.append(end)
    return [*ends[:-1], stop]


def sample_size(map: ConflictMap, bins: Similarity, known: float = 1.0) -> int:
    """Return the fewest groups that would likely resolve bins covering the share `known` of [0, T).

    It is M if they are resolved already, and MOST_GROUPS at most.
    """
    needed = np.full(map.N, map.M)
    for i in np.flatnonzero(~bins.resolved):
        needed[i] = _groups_for_bin(map, bins, int(i))
    order = np.argsort(needed, kind="stable")
    enough = np.searchsorted(np.cumsum(map.widths[order]), known - 1e-9)
    return int(needed[order[enough]])


def _groups_for_bin(map: ConflictMap, bins: Similarity, i: int) -> int:
    M, se = map.M, float(bins.K_se[i, i])
    signal = max(float(bins.K[i, i]), se)
    if signal <= 0:
        return MOST_GROUPS
    pair = float(map.gram[i, :, i, :][np.triu_indices(M, 1)].var(ddof=1))
    one = float(np.clip((se**2 * M * (M - 1) - 2 * pair) / (4 * (M - 2)), 0, pair / 2))
    m = np.arange(M + 1, MOST_GROUPS + 1, dtype=np.float64)
    enough = signal**2 > RESOLVED**2 * (4 * (m - 2) * one + 2 * pair) / (m * (m - 1))
    return int(m[enough.argmax()]) if enough.any() else MOST_GROUPS
