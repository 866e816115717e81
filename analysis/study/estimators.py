"""Two estimators of similarity: the plug-in cosine of the literature, and the unbiased one.

    plug-in     cos(S_i, S_j), S_i the sum over all groups: noise biases it upwards for shared
                draws, downwards for independent ones
    unbiased    K_ij / sqrt(K_ii K_jj) from pairs of different groups, for resolved bins alone

The plug-in is a function of means over groups, so its intervals come from the jackknife; those of
the unbiased one from the components of similarity.py. The plug-in's are narrow and in the wrong
place, since a standard error says nothing of a bias. If the truth is known (known.py), errors are
counted. On a real base two kinds of draws must give the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from demerge.analysis.measurement.options import DRAWS
from demerge.analysis.similarity import (
    all_cross_pairs,
    estimate_error,
    normalised,
    pair_weighted_gram,
    similarity,
    standard_error,
    t_quantile,
    without_pair,
)
from demerge.analysis.study.known import KnownProblem
from demerge.conflict import Array, ConflictMap
from demerge.errors import UsageError

PLUG_IN, UNBIASED = "plug-in", "unbiased"


def measure_errors(
    problem: KnownProblem,
    draws: Iterable[str] = DRAWS,
    *,
    groups: int = 8,
    batch_size: int = 8,
    maps: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure a known problem many times and return how far both cosines are from the truth.

    One row for each kind of draws and estimator, over all pairs of bins and all maps:
        bias: mean of estimate - truth, and `bias_se`, its standard error over maps; also for
            `neighbours`.
        rmse: root of the mean squared error.
        covered: share of the 95 % intervals that hold the truth.
        unresolved: share of bins for which the estimator gives nothing; the plug-in has none.
    """
    if maps < 2:
        raise UsageError(f"{maps} maps have no spread", fix="give at least 2")
    rows = []
    for kind in draws:
        size = {"groups": groups, "batch_size": batch_size}
        measured = [problem.measure(draws=kind, seed=seed + i, **size) for i in range(maps)]
        bins = [similarity(map) for map in measured]
        halves = [t_quantile(map.M) * standard_error(_plug_in_without(map)) for map in measured]
        plug_in = _summarise(problem.cosine, [each.naive for each in bins], halves)
        halves = [each.cosine_half for each in bins]
        unbiased = _summarise(problem.cosine, [each.cosine for each in bins], halves)
        for name, summary in ((PLUG_IN, plug_in), (UNBIASED, unbiased)):
            rows.append({"draws": kind, "estimator": name, **summary})
    return pd.DataFrame(rows)


def _summarise(truth: Array, values: list[Array], halves: list[Array]) -> dict[str, float]:
    off, half = np.array(values) - truth, np.array(halves)  # [maps N N], NaN if unresolved
    i, j = np.triu_indices(len(truth), 1)
    known = np.isfinite(off[:, i, j])
    bias, bias_se = _mean(off[:, i, j])
    near, near_se = _mean(np.diagonal(off, 1, axis1=1, axis2=2))
    rmse = covered = float("nan")
    if known.any():
        rmse = float(np.sqrt(np.mean(off[:, i, j][known] ** 2)))
        covered = float((abs(off[:, i, j]) <= half[:, i, j])[known].mean())
    unresolved = float(np.isnan(np.diagonal(off, axis1=1, axis2=2)).mean())
    errors = {"bias": bias, "bias_se": bias_se, "neighbours": near, "neighbours_se": near_se}
    return {**errors, "rmse": rmse, "covered": covered, "unresolved": unresolved}


def _mean(values: Array) -> tuple[float, float]:
    """Return the mean of all finite entries [maps P], and its standard error over maps."""
    known = np.isfinite(values)
    total, count = np.where(known, values, 0).sum(1), known.sum(1)
    if not count.any():
        return float("nan"), float("nan")
    mean = total.sum() / count.sum()
    se = (total - mean * count).std(ddof=1) / count.mean() / len(values) ** 0.5
    return float(mean), float(se)


def compare_by_samples(maps: Mapping[str, ConflictMap], groups: Iterable[int]) -> pd.DataFrame:
    """Return the mean cosine of neighbours as groups are added.

    Args:
        maps: by their kind of draws.
        groups: the numbers of groups; those that a map does not have are left out.

    Returns columns draws, estimator, samples, cosine, half, unresolved. `half` is half the 95 %
    interval; `unresolved` counts bins. The unbiased mean is over resolved pairs, NaN without any.
    """
    columns = ["draws", "estimator", "samples", "cosine", "half", "unresolved"]
    counts, rows = list(groups), []
    for kind, map in maps.items():
        for count in (n for n in counts if n <= map.M):
            part = take_groups(map, count)
            bins, samples = similarity(part), count * map.origin.batch_size
            left_out = np.array([_mean_neighbour(each) for each in _plug_in_without(part)])
            half = t_quantile(count) * float(standard_error(left_out))
            rows.append((kind, PLUG_IN, samples, _mean_neighbour(bins.naive), half, 0))
            pairs = normalised(without_pair(part), bins.resolved)
            half = float(estimate_error(np.array([_mean_neighbour(each) for each in pairs])).half())
            unresolved = int((~bins.resolved).sum())
            mean = _mean_neighbour(bins.cosine)
            rows.append((kind, UNBIASED, samples, mean, half, unresolved))
    return pd.DataFrame(rows, columns=columns)


def take_groups(map: ConflictMap, groups: int) -> ConflictMap:
    """Return the map of the first groups alone, as if no more had been measured."""
    sketches, layers = (s if s is None else s[:, :groups] for s in (map.sketches, map.layers))
    gram = np.ascontiguousarray(map.gram[:, :groups, :, :groups])
    return replace(map, gram=gram, sketches=sketches, layers=layers)


def measure_disagreement(first: ConflictMap, second: ConflictMap) -> pd.DataFrame:
    """Compare two maps of one model that share no sample, say of shared and independent draws.

    The mean gradients are the model's, however the samples were drawn. So an estimator that gives
    two answers is biased, and no truth is needed to see it.

    Returns one row for each estimator: the mean of <mu_i, mu_j> over pairs of bins i < j in each
    map, the standard errors, and `z`, the difference in units of its own.
    """
    if first.edges != second.edges or first.N < 2:
        what = f"maps of {first.N} and {second.N} bins do not compare"
        raise UsageError(what, fix="measure both on the same bins")
    rows = []
    i, j = np.triu_indices(first.N, 1)
    for name in (PLUG_IN, UNBIASED):
        means: list[float] = []
        for map in (first, second):
            if name == PLUG_IN:
                K, left_out = _plug_in_kernels(map)
                se = standard_error(left_out[:, i, j].mean(1))
            else:
                K = pair_weighted_gram(map, all_cross_pairs(map.M))
                se = estimate_error(without_pair(map)[:, i, j].mean(1)).se
            means += [float(K[i, j].mean()), float(se)]
        a, a_se, b, b_se = means
        scale = float(np.hypot(a_se, b_se))
        rows.append((name, *means, (a - b) / scale if scale else 0.0))
    columns = ["estimator", "first", "first_se", "second", "second_se", "z"]
    return pd.DataFrame(rows, columns=columns)


def _mean_neighbour(cosine: Array) -> float:
    values = np.diagonal(cosine, 1)
    known = np.isfinite(values)
    return float(values[known].mean()) if known.any() else float("nan")


def _plug_in_without(map: ConflictMap) -> Array:
    """Return the plug-in cosine without group m, for each m, [M N N]."""
    return normalised(_plug_in_kernels(map)[1], np.ones(map.N, dtype=bool))


def _plug_in_kernels(map: ConflictMap) -> tuple[Array, Array]:
    """Return <S_i, S_j> / M^2 [N N], and the same without group m, for each m, [M N N]."""
    left = 1 - np.eye(map.M)
    return pair_weighted_gram(map, np.ones((map.M, map.M))), pair_weighted_gram(
        map, left[:, :, None] * left[:, None, :]
    )
