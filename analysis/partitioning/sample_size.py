"""How many groups would resolve the bins that noise hides, from the noise that was seen.

A bin is resolved if K_ii > 3 SE(K_ii). K_ii is a U-statistic of pairs of groups. Its variance at M
groups is

    Var(M) = [4 (M - 2) sigma_1^2 + 2 sigma_2^2] / (M (M - 1)),

sigma_2^2 that of one pair <s_i^m, s_i^n>, sigma_1^2 <= sigma_2^2 / 2 that of its mean over n. The
first comes from all pairs, the second from the SE at the M that were measured. The signal is itself
uncertain: if K_ii is below its SE, the SE takes its place, and the number is a lower bound.

Paper: Hoeffding, A class of statistics with asymptotically normal distribution, 1948.
"""

from __future__ import annotations

import numpy as np

from demerge.analysis.similarity import RESOLVED, Similarity
from demerge.conflict import ConflictMap

MOST = 100_000


def sample_size(map: ConflictMap, bins: Similarity, known: float = 1.0) -> int:
    """Return the fewest groups that would likely resolve bins covering the share `known` of [0, T).

    It is M if they are resolved already, and 100,000 at most.
    """
    needed = np.full(map.N, map.M)
    for i in np.flatnonzero(~bins.resolved):
        needed[i] = _of_bin(map, bins, int(i))
    order = np.argsort(needed, kind="stable")
    enough = np.searchsorted(np.cumsum(map.widths[order]), known - 1e-9)
    return int(needed[order[enough]])


def _of_bin(map: ConflictMap, bins: Similarity, i: int) -> int:
    M, se = map.M, float(bins.K_se[i, i])
    signal = max(float(bins.K[i, i]), se)
    if signal <= 0:
        return MOST
    pair = float(map.gram[i, :, i, :][np.triu_indices(M, 1)].var(ddof=1))
    one = float(np.clip((se**2 * M * (M - 1) - 2 * pair) / (4 * (M - 2)), 0, pair / 2))
    m = np.arange(M + 1, MOST + 1, dtype=np.float64)
    enough = signal**2 > RESOLVED**2 * (4 * (m - 2) * one + 2 * pair) / (m * (m - 1))
    return int(m[enough.argmax()]) if enough.any() else MOST
