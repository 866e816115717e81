"""Similarity of gradients between bins of timesteps, unbiased, with errors.

The gradient of bin i on group m is s_i^m = mu_i + noise. The noise of different groups is
independent. That of one group is not, as its draws are shared between the bins. So only pairs of
different groups count: the U-statistic

    K_ij = [ <S_i, S_j> - sum_m <s_i^m, s_j^m> ] / (M (M - 1)),  S_i = sum_m s_i^m
    E K_ij = <mu_i, mu_j>

    rho_ij = K_ij / sqrt(K_ii K_jj),      for resolved bins, K_ii > 3 SE(K_ii); NaN elsewhere
    naive_ij = cos(S_i, S_j),             biased: shared noise invents similarity, other hides it
    reliability_i = cos(s_i^A, s_i^B),    A, B halves of the groups, averaged over ways to halve
    nu_i = tr Sigma_i / |mu_i|^2,         the number of samples at which noise equals signal

Everything here is K for some weights on pairs of groups: all for the naive, unequal for K, all but
one pair for errors, A x B for halves, random for the bootstrap.

A statistic f(K) is, to first order, the mean over pairs of groups of h_mn. Leaving out the pair
(m, n) shows it:

    h_mn = P f(K) - (P - 1) f(K without the pair),  P = M (M - 1)/2; for K it is <s_i^m, s_j^n>

The variance of such a mean is that of Hoeffding's decomposition h_mn = h + a_m + a_n + e_mn. It
comes from the mean squares of an analysis of variance, MS_a (M - 1 degrees of freedom) and MS_e
(M (M - 3)/2):

    SE^2 = 4 MS_a / (M (M - 2)) - 2 MS_e / ((M - 1) (M - 2))

The first term is the jackknife over groups, the second what it counts twice. SE^2 is unbiased, and
equal to U^2 - mean of h_ij h_kl over unequal i, j, k, l. If MS_a < MS_e, the variance of a_m is
estimated as negative and taken as 0: the pairs are then as good as independent, and SE^2 is the
variance of h_mn over P. Intervals take Student's t at the degrees of freedom of Satterthwaite.
Near mean gradients of 0 the jackknife alone is 1.5 to 1.6 times too large, and a bin needs twice
the groups to be resolved.

What that is worth, in simulations with 5 to 16 groups: intervals of K_ii cover 93 to 97 % if mu_i
is not 0, and 97 to 99 % if it is. A bin without any gradient passes for resolved in fewer than 1 %
of maps. A bin that passes by luck has too large a K_ii. Its cosines lean towards 0 or, with shared
draws, towards 1. This matters for signals below some 5 SE: such a bin would often not pass again.
Bins below 3 + 1.64 SE are marked as `weak`: read their cosines as a hint.

Papers: Hoeffding, A class of statistics with asymptotically normal distribution, 1948;
Satterthwaite, Biometrics Bulletin 2, 1946; of the noise scale McCandlish et al., arXiv 1812.06162.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from demerge.conflict import Array, ConflictMap
from demerge.randomness import generator

if TYPE_CHECKING:
    import pandas as pd

RESOLVED = 3.0
SURE = RESOLVED + 1.64  # another map would resolve the bin, with a chance of 95 %
MAX_SPLITS = 20
LISTED = 16  # groups up to which all halves are listed and chosen from without repetition


@dataclass(frozen=True, slots=True, eq=False)
class Similarity:
    """What a map says about its bins."""

    K: Array  # estimate of <mu_i, mu_j>, [N N]
    K_se: Array  # its standard error, [N N]
    K_half: Array  # half its 95 % interval, [N N]
    cosine: Array  # rho, not clipped to [-1, 1]; NaN if a bin is unresolved, [N N]
    cosine_se: Array  # [N N]
    cosine_half: Array  # [N N]
    resolved: NDArray[np.bool_]  # whether K_ii > 3 SE, [N]
    weak: NDArray[np.bool_]  # resolved, perhaps by luck: K_ii < 4.64 SE, [N]
    naive: Array  # cosine of the mean gradients, [N N], biased
    reliability: Array  # cosine of two halves of the groups, [N]
    noise: Array  # nu in samples, [N], NaN if a bin is unresolved


def similarity(map: ConflictMap) -> Similarity:
    """Estimate similarity, its errors, and how far each can be trusted."""
    K, pairs = pair_weighted_gram(map, all_cross_pairs(map.M)), without_pair(map)
    K_error = estimate_error(pairs)
    signal, se = np.diagonal(K), np.diagonal(K_error.se)
    resolved = signal > RESOLVED * se
    cosine_error = estimate_error(normalised(pairs, resolved))
    naive = pair_weighted_gram(map, np.ones((map.M, map.M)))
    squares, known = np.einsum("imim->i", map.gram) / map.M, np.where(resolved, signal, np.nan)
    return Similarity(
        K=K,
        K_se=K_error.se,
        K_half=K_error.half(),
        cosine=normalised(K, resolved),
        cosine_se=cosine_error.se,
        cosine_half=cosine_error.half(),
        resolved=resolved,
        weak=resolved & (signal < SURE * se),
        naive=normalised(naive, np.ones(map.N, dtype=bool)),
        reliability=reliability(map),
        noise=map.origin.batch_size * (squares - known) / known,
    )


def pair_weighted_gram(map: ConflictMap, pairs: Array) -> Array:
    """Return sum_mn p_mn <s_i^m, s_j^n> / sum_mn p_mn, [* N N], for symmetric weights p [* M M]."""
    N, M = map.N, map.M
    flat = map.gram.transpose(0, 2, 1, 3).reshape(N * N, M * M)
    weights = pairs.reshape(-1, M * M)
    K: Array = (weights @ flat.T) / weights.sum(1, keepdims=True)
    return K.reshape(*pairs.shape[:-2], N, N)


def all_cross_pairs(M: int) -> Array:
    """Return weights [M M] that pair each group with all others."""
    return np.ones((M, M)) - np.eye(M)


def group_weights_to_pairs(weights: Array) -> Array:
    """Return weights on pairs of unequal groups [* M M] from weights on groups [* M]."""
    pairs: Array = weights[..., :, None] * weights[..., None, :]
    return pairs * all_cross_pairs(weights.shape[-1])


def leave_one_out(map: ConflictMap) -> Array:
    """Return K without group m, for each m, [M N N]."""
    return pair_weighted_gram(map, group_weights_to_pairs(1 - np.eye(map.M)))


def without_pair(map: ConflictMap) -> Array:
    """Return K without one pair of groups, for each m < n, [P N N]."""
    m, n = np.triu_indices(map.M, 1)
    products = map.gram[:, m, :, n]  # [P N N]
    products = (products + products.transpose(0, 2, 1)) / 2
    return np.asarray((products.sum(0) - products) / (len(m) - 1))


def halves(groups: Sequence[int], M: int, seed: int) -> tuple[Array, Array]:
    """Halve `groups` in up to 20 ordered ways.

    Returns the weights on groups [S M] of the first halves, and those of the second.
    """
    stream, half = generator(seed, "analysis-halves", len(groups)), len(groups) // 2
    if len(groups) > LISTED:
        firsts = [tuple(stream.permutation(list(groups))[:half]) for _ in range(MAX_SPLITS)]
    elif len(firsts := list(combinations(groups, half))) > MAX_SPLITS:
        firsts = [firsts[i] for i in sorted(stream.choice(len(firsts), MAX_SPLITS, replace=False))]
    A, everyone = np.zeros((len(firsts), M)), np.zeros(M)
    for row, first in zip(A, firsts, strict=True):
        row[list(first)] = 1
    everyone[list(groups)] = 1
    return A, everyone - A


@dataclass(frozen=True, slots=True, eq=False)
class ErrorEstimate:
    """The standard error of an estimate [*], and the degrees of freedom that it rests on, [*]."""

    se: Array
    df: Array

    def half(self, level: float = 0.95) -> Array:
        """Return half the width of a two-sided interval, [*]."""
        half: Array = stdtrit(self.df, (1 + level) / 2) * self.se
        return half


@cache
def _members(M: int) -> Array:
    """Return which of M groups each pair has, [M P] of 0 and 1."""
    members = np.zeros((M, M * (M - 1) // 2))
    for which in np.triu_indices(M, 1):
        members[which, np.arange(members.shape[1])] = 1
    return members


def estimate_error(values: Array) -> ErrorEstimate:
    """Estimate the error of a statistic of K, [*], from its values without each pair, [P *]."""
    P = len(values)
    M = (1 + math.isqrt(1 + 8 * P)) // 2
    h = (P - 1) * (values - values.mean(0)).reshape(P, -1)
    a_squares, squares = ((_members(M) @ h) ** 2).sum(0) / (M - 2), (h**2).sum(0)
    a_df, e_df = M - 1, M * (M - 3) / 2
    a, e = a_squares / a_df, np.clip(squares - a_squares, 0, None) / e_df
    plus, minus = 4 * a / (M * (M - 2)), 2 * e / ((M - 1) * (M - 2))
    groups_differ = a > e
    variance = np.where(groups_differ, plus - minus, squares / (P - 1) / P)
    scale = plus**2 / a_df + minus**2 / e_df
    satterthwaite = np.divide(variance**2, scale, out=np.ones_like(scale), where=scale > 0)
    df = np.where(groups_differ, satterthwaite, P - 1)
    shape = values.shape[1:]
    return ErrorEstimate(np.sqrt(variance).reshape(shape), df.reshape(shape))


def standard_error(left_out: Array) -> Array:
    """Return the jackknife's SE [*] of a mean over groups from the values without group m [M *]."""
    M = len(left_out)
    se: Array = np.sqrt((M - 1) / M * ((left_out - left_out.mean(0)) ** 2).sum(0))
    return se


def t_quantile(M: int, level: float = 0.95) -> float:
    """Return the factor on the jackknife's SE that makes the interval of a mean of M groups."""
    return float(stdtrit(M - 1, (1 + level) / 2))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its standard error."""

    value: float
    se: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.se:.3f}"

    def above(self, factor: float) -> bool:
        """Return whether the value lies more than `factor` standard errors above 0."""
        return self.value > factor * self.se

    def document(self, value: str = "value") -> dict[str, float | None]:
        """Return JSON values; `value` names the number."""
        return {value: json_number(self.value), "se": json_number(self.se)}


def estimate_table(
    corner: str, rows: Mapping[str, Mapping[str, Estimate]], marked: str, caption: str
) -> list[str]:
    """Return lines for a person: a row of estimates by column for each label, one row marked."""
    lines: list[str] = []
    for label, row in rows.items():
        if not lines:
            lines.append(f"{corner:>12}  {'  '.join(f'{name:>13}' for name in row)}   {caption}")
        cells = "  ".join(f"{each.value:6.2f} ± {each.se:.2f}" for each in row.values())
        lines.append(f"{label:>12}  {cells}{'   <' if label == marked else ''}")
    return lines


def json_number(value: float) -> float | None:
    """Return a number for JSON, of six digits; None if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def normalised(K: Array, resolved: NDArray[np.bool_]) -> Array:
    """Return K_ij / sqrt(K_ii K_jj), [* N N], NaN if K_ii or K_jj is unresolved or not positive."""
    signal = np.diagonal(K, axis1=-2, axis2=-1)
    norms = np.sqrt(np.where(resolved & (signal > 0), signal, np.nan))
    return np.asarray(K / (norms[..., :, None] * norms[..., None, :]))


def reliability(map: ConflictMap) -> Array:
    """Return cos(s_i^A, s_i^B) [N], the mean over ways to halve the groups."""
    A, B = halves(range(map.M), map.M, map.origin.seed)
    products = [
        np.diagonal(pair_weighted_gram(map, a[:, :, None] * b[:, None, :]), axis1=1, axis2=2)
        for a, b in ((A, A), (B, B), (A, B))
    ]
    norms = np.sqrt(products[0] * products[1])
    cosines = np.divide(products[2], norms, out=np.zeros_like(norms), where=norms > 0)
    return np.asarray(cosines.mean(0))


def frame(map: ConflictMap) -> pd.DataFrame:
    """Return rho of each pair of bins, a row each, [N^2 rows].

    Columns bin_i, bin_j (indices), t_i, t_j (the middles of the bins), cosine, se, resolved (both
    bins), weak (one of them).
    """
    import pandas as pd

    bins = similarity(map)
    i, j = (index.ravel() for index in np.indices((map.N, map.N)))
    both = bins.resolved[i] & bins.resolved[j]
    pair = {"bin_i": i, "bin_j": j, "t_i": map.timesteps[i], "t_j": map.timesteps[j]}
    values = {"cosine": bins.cosine[i, j], "se": bins.cosine_se[i, j], "resolved": both}
    return pd.DataFrame({**pair, **values, "weak": both & (bins.weak[i] | bins.weak[j])})


def by_lag(bins: Similarity, pairs: Array) -> pd.DataFrame:
    """Return the mean rho of resolved pairs, and naive of all, at each lag; pairs: K [P N N].

    Columns lag, cosine, se, half (of its 95 % interval), naive, pairs.
    """
    import pandas as pd

    replicates, rows = normalised(pairs, bins.resolved), []
    for lag in range(1, len(bins.K)):
        cosines, naive = np.diagonal(bins.cosine, lag), np.diagonal(bins.naive, lag).mean()
        known = np.flatnonzero(np.isfinite(cosines))
        row = {"lag": lag, "naive": naive, "pairs": len(known)}
        if len(known):
            left_out = np.diagonal(replicates, lag, axis1=1, axis2=2)[:, known].mean(1)
            error = estimate_error(left_out)
            row |= {"cosine": cosines[known].mean(), "se": float(error.se)}
            row |= {"half": float(error.half())}
        rows.append(row)
    columns = ["lag", "cosine", "se", "half", "naive", "pairs"]
    return pd.DataFrame(rows, columns=columns, dtype=np.float64)


def by_log_snr(map: ConflictMap, bins: Similarity) -> pd.DataFrame:
    """Return rho of each resolved pair of bins with their distance in log SNR.

    Columns distance, cosine, se, t (of the lower bin).
    """
    import pandas as pd

    level = np.array([map.log_snr[span.start : span.stop].mean() for span in map.bins])
    i, j = np.triu_indices(map.N, 1)
    known = np.isfinite(bins.cosine[i, j])
    i, j = i[known], j[known]
    values = {"cosine": bins.cosine[i, j], "se": bins.cosine_se[i, j], "t": map.timesteps[i]}
    return pd.DataFrame({"distance": abs(level[i] - level[j]), **values})
