"""Similarity: unbiased where the naive cosine is not, errors that cover, and slow oracles of the fast sums."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest

from demerge.analysis.similarity import (
    RESOLVED,
    SURE,
    all_cross_pairs,
    by_lag,
    by_log_snr,
    estimate_error,
    group_weights_to_pairs,
    halves,
    leave_one_out,
    pair_weighted_gram,
    similarity,
    standard_error,
    t_quantile,
    without_pair,
)
from demerge.conflict import Array

N, M, D = 4, 8, 6
MU = np.array(
    [[2, 0, 0, 0, 0, 0], [1.5, 1, 0, 0, 0, 0], [0.5, 1, 1, 0, 0, 0], [-1, 0, 1, 1, 0, 0]],
    dtype=float,
)
ROOT = np.diag([1.5, 1.0, 0.7, 0.5, 0.5, 0.2])  # Sigma = ROOT ROOT'


def draw(rng: np.random.Generator, draws: str) -> Array:
    """Gradients [N M D] with mean MU and covariance Sigma, their noise the same for all bins or another for each."""
    noise = rng.standard_normal((1 if draws == "shared" else N, M, D)) @ ROOT
    return MU[:, None] + np.broadcast_to(noise, (N, M, D))


@pytest.mark.parametrize("draws", ["shared", "independent"])
def test_the_statistic_is_unbiased_and_the_naive_one_is_biased_as_predicted(
    map_of: Any, draws: str
) -> None:
    rng = np.random.default_rng(0)
    maps = [map_of(draw(rng, draws)) for _ in range(1500)]
    unbiased = np.array([pair_weighted_gram(map, all_cross_pairs(M)) for map in maps])
    naive = np.array([pair_weighted_gram(map, np.ones((M, M))) for map in maps])
    bias = np.trace(ROOT @ ROOT.T) / M * (np.ones((N, N)) if draws == "shared" else np.eye(N))
    for values, expected in ((unbiased, MU @ MU.T), (naive, MU @ MU.T + bias)):
        z = (values.mean(0) - expected) / (values.std(0) / len(maps) ** 0.5)
        assert abs(z).max() < 3.5
    assert np.diagonal(bias).min() > 5 * (naive.std(0) / len(maps) ** 0.5).max()


def test_the_naive_cosine_is_wrong_both_ways(map_of: Any) -> None:
    rng, truth = (
        np.random.default_rng(1),
        MU[0] @ MU[3] / (np.linalg.norm(MU[0]) * np.linalg.norm(MU[3])),
    )
    found = {
        kind: [similarity(map_of(draw(rng, kind))) for _ in range(200)]
        for kind in ("shared", "independent")
    }
    mean = {kind: np.mean([s.naive[0, 3] for s in each]) for kind, each in found.items()}
    assert mean["shared"] > truth + 0.05
    assert abs(mean["independent"]) < abs(truth) - 0.03
    for each in found.values():
        K = np.mean([s.K for s in each], axis=0)
        assert abs(K[0, 3] / np.sqrt(K[0, 0] * K[3, 3]) - truth) < 0.03


@pytest.mark.parametrize("draws", ["shared", "independent"])
def test_intervals_cover(map_of: Any, draws: str) -> None:
    rng, upper = np.random.default_rng(2), np.triu_indices(N, 1)
    for scale in (1, 3):
        truth = scale**2 * MU @ MU.T
        rho = (truth / np.sqrt(np.outer(np.diagonal(truth), np.diagonal(truth))))[upper]
        found = [
            similarity(map_of(draw(rng, draws) + (scale - 1) * MU[:, None])) for _ in range(400)
        ]
        assert 0.93 <= np.mean([abs(s.K - truth) <= s.K_half for s in found]) <= 0.97
        if scale == 3:  # all bins are resolved, so that none is chosen by its noise
            assert (
                0.92
                <= np.mean([abs(s.cosine[upper] - rho) <= s.cosine_half[upper] for s in found])
                <= 0.97
            )


# -- errors: thousands of maps of one bin at once ------------------------------------------------------------------------

GROUPS = (5, 8, 12, 16)
MAPS, DIMENSIONS = 3000, 100


def bins(groups: int, strength: float, *, seed: int = 0) -> tuple[Array, Array, float]:
    """K of one bin on many maps [R], K without each pair of groups [P R], and the truth: `strength` times the SD at 0."""
    truth = strength * (2 * DIMENSIONS / (groups * (groups - 1))) ** 0.5
    s = np.random.default_rng([seed, groups]).standard_normal((MAPS, groups, DIMENSIONS))
    s[..., 0] += truth**0.5
    m, n = np.triu_indices(groups, 1)
    h = (s @ s.transpose(0, 2, 1))[:, m, n].T
    return h.mean(0), (h.sum(0) - h) / (len(h) - 1), truth


def test_the_variance_is_the_mean_over_unequal_quadruples_and_positive() -> None:
    """U^2 - mean of h_ij h_kl over disjoint pairs, wherever groups differ by more than pairs; that of pairs elsewhere."""
    s = np.random.default_rng(0).standard_normal((40, 6, 3)) + 0.7
    h = s @ s.transpose(0, 2, 1)
    m, n = np.triu_indices(6, 1)
    pairs = h[:, m, n].T
    found = estimate_error((pairs.sum(0) - pairs) / (len(pairs) - 1))
    i, j, k, l = np.array(list(permutations(range(6), 4))).T  # noqa: E741
    slow = pairs.mean(0) ** 2 - (h[:, i, j] * h[:, k, l]).mean(1)
    free = pairs.var(0, ddof=1) / len(pairs)
    apart = found.df != len(pairs) - 1
    assert 0 < apart.mean() < 1
    assert found.se**2 == pytest.approx(np.where(apart, slow, free))
    assert (slow[~apart] < free[~apart]).all() and (found.se > 0).all()


def test_the_variance_of_a_mean_over_groups_is_the_jackknifes() -> None:
    """h_mn = x_m + x_n has no noise of pairs, and M - 1 degrees of freedom."""
    x = np.random.default_rng(0).standard_normal(9)
    m, n = np.triu_indices(9, 1)
    h = (x[m] + x[n]) / 2
    found = estimate_error((h.sum() - h) / (len(h) - 1))
    assert found.se == pytest.approx(x.std(ddof=1) / 3) and found.df == pytest.approx(8)
    assert found.half() == pytest.approx(t_quantile(9) * found.se)


@pytest.mark.parametrize("groups", GROUPS)
def test_intervals_of_a_signal_cover_95_percent(groups: int) -> None:
    """Noise of the simulation: 0.4 % for one strength, 0.16 % for their mean."""
    covered = []
    for strength in (1, 2, 4, 8, 16, 32):
        K, left, truth = bins(groups, strength)
        covered.append(np.mean(abs(K - truth) <= estimate_error(left).half()))
    assert 0.94 - 0.005 <= np.mean(covered) <= 0.96 + 0.005
    assert min(covered) > 0.92 and max(covered) < 0.98
    K, left, _ = bins(groups, 0)
    assert 0.95 <= np.mean(abs(K) <= estimate_error(left).half()) <= 0.985


@pytest.mark.parametrize("groups", GROUPS)
def test_bins_without_gradient_are_hardly_ever_resolved_and_others_with_half_of_the_groups(
    groups: int,
) -> None:
    K, left, _ = bins(groups, 0)
    assert np.mean(RESOLVED * estimate_error(left).se < K) < 0.01
    K, left, _ = bins(groups, 5)
    m, n = np.triu_indices(groups, 1)
    pairs = K - (len(left) - 1) * (left - K)
    sums = np.array([pairs[(m == g) | (n == g)].sum(0) for g in range(groups)])
    without = (pairs.sum(0) - sums) / (len(pairs) - groups + 1)
    ours, jackknife = (
        np.mean(RESOLVED * se < K) for se in (estimate_error(left).se, standard_error(without))
    )
    assert ours > 0.55 and ours > 1.3 * jackknife


@pytest.mark.parametrize("groups", [6, 12])
def test_bins_that_pass_by_luck_are_marked(groups: int) -> None:
    """Three of four that pass with a power below one half are marked, and hardly any with a signal of 15 SE."""
    for strength, least, most in ((2, 0.75, 1), (3, 0.7, 1), (20, 0, 0.1)):
        K, left, truth = bins(groups, strength)
        se = estimate_error(left).se
        resolved, weak = RESOLVED * se < K, SURE * se > K
        assert least <= weak[resolved].mean() <= most
        if strength == 2:
            assert K[resolved].mean() > 1.5 * truth, "luck that needs no mark"


def test_kernel_is_the_sum_it_says(map_of: Any) -> None:
    s = draw(np.random.default_rng(3), "independent")
    map, p = map_of(s), np.random.default_rng(4).random((2, M, M))
    p = p + p.transpose(0, 2, 1)
    slow = np.zeros((2, N, N))
    for b, m, n in np.ndindex(2, M, M):
        slow[b] += p[b, m, n] * s[:, m] @ s[:, n].T / p[b].sum()
    assert np.allclose(pair_weighted_gram(map, p), slow)
    S = s.sum(1)
    u = (S @ S.T - np.einsum("imd,jmd->ij", s, s)) / (M * (M - 1))
    assert np.allclose(pair_weighted_gram(map, all_cross_pairs(M)), u)
    assert np.allclose(
        leave_one_out(map)[2],
        pair_weighted_gram(map_of(np.delete(s, 2, axis=1)), all_cross_pairs(M - 1)),
    )
    assert np.allclose(pair_weighted_gram(map, group_weights_to_pairs(np.ones(M))), u)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = np.random.default_rng(0).standard_normal(9)
    left_out = (x.sum() - x) / 8
    assert standard_error(left_out) == pytest.approx(x.std(ddof=1) / 3)
    assert t_quantile(8) == pytest.approx(2.3646, abs=1e-4)


@pytest.mark.parametrize(
    ("groups", "count"), [(range(6), 20), (range(9), 20), ([0, 2, 3, 5], 6), (range(5), 10)]
)
def test_halves_are_distinct_and_complete(groups: Any, count: int) -> None:
    A, B = halves(groups, 9, seed=0)
    assert A.shape == B.shape == (count, 9)
    assert len({row.tobytes() for row in A}) == count
    assert (
        (A * B == 0).all()
        and ((A + B).sum(1) == len(groups)).all()
        and min(A.sum(1).min(), B.sum(1).min()) >= 2
    )
    assert all(set(np.flatnonzero(row)) <= set(groups) for row in A + B)


def test_bins_without_signal_are_unresolved_and_nan(map_of: Any) -> None:
    s = draw(np.random.default_rng(5), "shared") + 6 * np.eye(N, D)[:, None]
    s[1] = np.random.default_rng(6).standard_normal((M, D))
    found = similarity(map_of(s))
    assert found.resolved.tolist() == [True, False, True, True]
    assert (
        np.isnan(found.cosine[1]).all()
        and np.isnan(found.cosine_se[:, 1]).all()
        and np.isnan(found.noise[1])
    )
    rest = found.cosine[np.ix_([0, 2, 3], [0, 2, 3])]
    assert (
        np.allclose(np.diagonal(rest), 1)
        and np.isfinite(rest).all()
        and (found.cosine_se[0, [2, 3]] > 0).all()
    )
    assert found.reliability[1] < 0.5 < found.reliability[0]


def test_zero_gradients_are_unresolved_and_nothing_warns(map_of: Any) -> None:
    found = similarity(map_of(np.zeros((N, M, D))))
    assert (
        not found.resolved.any() and np.isnan(found.cosine).all() and (found.reliability == 0).all()
    )


def test_reliability_and_noise_scale_of_known_noise(map_of: Any) -> None:
    rng = np.random.default_rng(7)
    found = [
        similarity(map_of(10 * MU[:, None] + draw(rng, "shared") - MU[:, None])) for _ in range(100)
    ]
    signal, noise = 100 * (MU**2).sum(1), np.trace(ROOT @ ROOT.T)
    assert np.mean([s.noise for s in found], axis=0) == pytest.approx(
        4 * noise / signal, rel=0.1
    )  # groups of 4 samples
    assert min(s.reliability.min() for s in found) > 0.95


def test_tables_by_distance(map_of: Any) -> None:
    map = map_of(10 * MU[:, None] + draw(np.random.default_rng(8), "shared"))
    bins = similarity(map)
    lags, pairs, rho = by_lag(bins, without_pair(map)), by_log_snr(map, bins), bins.cosine
    assert lags.lag.tolist() == [1, 2, 3] and lags.pairs.tolist() == [3, 2, 1]
    assert lags.cosine[1] == pytest.approx((rho[0, 2] + rho[1, 3]) / 2)
    assert len(pairs) == 6 and pairs.distance.min() == pytest.approx(19 * 250 / 999)
    empty = map_of(np.zeros((N, M, D)))
    none = similarity(empty)
    assert by_lag(none, without_pair(empty)).cosine.isna().all()
    assert len(by_log_snr(empty, none)) == 0
