"""Plots of a conflict map and of task vectors: a value in, a matplotlib figure out; `render` makes bytes of it.

Colours are of seaborn's `colorblind` and of maps that keep their order in grey; what is not resolved is hatched, never
coloured. Figures lie on white, whatever style is set, to be read in print and in dark notebooks; with `theme=DARK` a dark page
shows through. Nothing touches pyplot's state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from demerge.analysis.experts.task_vectors import TaskVectors
from demerge.analysis.partitioning.bootstrap import Evidence
from demerge.analysis.partitioning.cross_validation import Count, count
from demerge.analysis.partitioning.objective import FOUND
from demerge.analysis.report.partition_plots import EMPTY, cut_support, explained_share
from demerge.analysis.similarity import Similarity, by_lag, by_log_snr, similarity
from demerge.conflict import Array, ConflictMap
from demerge.reporting.theme import BLUE, DARK, GREY, LIGHT, ORANGE, Theme, styled
from demerge.timesteps import Partition

MANY = 40


def figures(
    map: ConflictMap,
    partition: Partition,
    *,
    score: str = "step",
    method: str = "gradient",
    minimum: int | None = None,
    counted: Count | None = None,
    theme: Theme = LIGHT,
) -> dict[str, Figure]:
    """Draw everything a map has to show, by file name; a plot with nothing to show is left out.

    Args:
        partition: the cut that was taken.
        score, method, minimum: how cuts that look at the map are found.
        counted: what `count` found with these, where it is known already.
    """
    looks = method if method in FOUND else "gradient"
    counted = counted or count(map, method=looks, score=score, minimum=minimum)
    evidence = Evidence.of(map, score)
    drawn = {
        "heatmap": heat_map(map, partition, theme=theme),
        "curve": explained_share(evidence, counted, len(partition), theme=theme),
        "support": cut_support(evidence, partition, looks, minimum, theme=theme),
        "similarity": similarity_by_distance(map, theme=theme),
        "strength": strength(map, partition, theme=theme),
    }
    return {name: figure for name, figure in drawn.items() if figure.get_label() != EMPTY}


def _figure(
    columns: int = 1, *, width: float = 6.4, height: float = 4.2
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, k + 1) for k in range(columns)]
    for ax in axes:
        sns.despine(ax=ax)
    return figure, axes


# -- the map -------------------------------------------------------------------------------------------------------------


@styled
def heat_map(
    map: ConflictMap, partition: Partition | None = None, *, theme: Theme = LIGHT
) -> Figure:
    """Draw rho on and below the diagonal, its SE above; unresolved bins hatched, weak ones dotted, cuts as lines."""
    found = similarity(map)
    figure, (ax,) = _figure(width=7.4, height=4.9)
    upper = np.triu(np.ones((map.N, map.N), dtype=bool), 1)
    se = np.where(upper, found.cosine_se, np.nan)
    if np.isfinite(se).any():
        span = (0.0, max(float(np.nanmax(se)), 1e-6))
        _mesh(
            figure,
            ax,
            map,
            se,
            "Greys_r" if theme is DARK else "Greys",
            span,
            "standard error (above the diagonal)",
        )
    cosine = np.where(upper, np.nan, np.clip(found.cosine, -1, 1))
    _mesh(figure, ax, map, cosine, theme.maps, (-1, 1), "cosine of gradients (below)")
    _hatch(ax, map, found, theme)
    for place in partition.cuts if partition else []:
        ax.axvline(place, color=theme.ink, lw=1.4, ls="--")
        ax.axhline(place, color=theme.ink, lw=1.4, ls="--")
    ax.set(
        xlabel="timestep t (0 = least noise)",
        ylabel="timestep t",
        aspect="equal",
        xlim=(0, map.T),
        ylim=(map.T, 0),
    )
    ax.set_title(_heading(map, found), loc="left", fontsize=10)
    return figure


def _mesh(
    figure: Figure,
    ax: Axes,
    map: ConflictMap,
    values: Array,
    cmap: str,
    span: tuple[float, float],
    label: str,
) -> None:
    mesh = ax.pcolormesh(
        map.edges, map.edges, np.ma.masked_invalid(values), cmap=cmap, vmin=span[0], vmax=span[1]
    )
    mesh.set_rasterized(map.N > MANY)
    bar = figure.colorbar(mesh, ax=ax, label=label, shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)


def _hatch(ax: Axes, map: ConflictMap, found: Similarity, theme: Theme) -> None:
    face, edge = ("none", "0.4") if theme is DARK else ("0.96", "0.7")
    for (i, j), value in np.ndenumerate(found.cosine):
        x, y = map.bins[j], map.bins[i]
        cell = Rectangle((x.start, y.start), len(x), len(y), facecolor="none", edgecolor=edge, lw=0)
        if not np.isfinite(value):
            cell.set(facecolor=face, hatch="////")
        elif i >= j and (found.weak[i] or found.weak[j]):
            cell.set(hatch="...")
        else:
            continue
        ax.add_patch(cell)


def _heading(map: ConflictMap, found: Similarity) -> str:
    missing, weak = int((~found.resolved).sum()), int(found.weak.sum())
    tail = (f", {missing} unresolved (hatched)" if missing else "") + (
        f", {weak} weak (dotted)" if weak else ""
    )
    return f"Gradient similarity: {map.N} bins, {map.M} groups of {map.origin.batch_size}{tail}"


# -- similarity by distance ----------------------------------------------------------------------------------------------


@styled
def similarity_by_distance(map: ConflictMap, *, theme: Theme = LIGHT) -> Figure:
    """Draw the mean rho by lag of bins with its 95 % interval, the naive cosine beside it; and rho by distance in log SNR."""
    figure, (left, right) = _figure(2, width=9.6, height=4.0)
    lags, pairs = by_lag(map), by_log_snr(map)
    step = map.T / map.N
    _band(left, lags.lag * step, lags.cosine, lags.half)
    left.plot(lags.lag * step, lags.naive, color=ORANGE, ls="--", label="naive (biased), all pairs")
    left.set(
        xlabel="distance in timesteps",
        ylabel="cosine of gradients",
        ylim=_limits(lags.cosine, lags.naive),
    )
    left.legend(frameon=False)
    if len(pairs):
        sns.scatterplot(
            pairs,
            x="distance",
            y="cosine",
            hue="t",
            palette="cool" if theme is DARK else "viridis",
            ax=right,
            s=18,
            linewidth=0,
        )
    else:
        right.text(0.5, 0.5, "no pair is resolved", ha="center", transform=right.transAxes)
        figure.set_label(EMPTY)
    right.set(xlabel="distance in log SNR", ylabel="", ylim=_limits(pairs.cosine, lags.naive))
    if right.get_legend():
        sns.move_legend(right, "best", title="t of the lower bin", frameon=False, fontsize=8)
    for ax in (left, right):
        ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    left.set_title("Mean over resolved pairs of bins", loc="left", fontsize=10)
    right.set_title("Each resolved pair", loc="left", fontsize=10)
    return figure


def _band(ax: Axes, x: pd.Series, y: pd.Series, half: pd.Series) -> None:
    ax.plot(x, y, color=BLUE, marker="o", ms=4, label="unbiased with 95 % interval, resolved pairs")
    ax.fill_between(x, y - half, y + half, color=BLUE, alpha=0.2, lw=0)


def _limits(*series: pd.Series) -> tuple[float, float]:
    values = pd.concat(series)
    return min(-0.1, float(np.clip(values.min(), -1, 1)) - 0.1), 1.05


# -- strength and noise --------------------------------------------------------------------------------------------------


@styled
def strength(
    map: ConflictMap, partition: Partition | None = None, *, theme: Theme = LIGHT
) -> Figure:
    """Draw |mu_t| with its 95 % interval (unresolved bins open) and the noise scale nu_t in samples."""
    found = similarity(map)
    figure, (left, right) = _figure(2, width=9.6, height=3.8)
    signal, half = np.diagonal(found.K), np.diagonal(found.K_half)
    size, low, high = (np.sqrt(np.clip(v, 0, None)) for v in (signal, signal - half, signal + half))
    left.errorbar(
        map.timesteps,
        size,
        [size - low, high - size],
        fmt="none",
        ecolor=BLUE,
        elinewidth=1,
        capsize=2,
    )
    sns.lineplot(x=map.timesteps, y=size, ax=left, color=BLUE, lw=1)
    for known, face, label in (
        (True, BLUE, "resolved"),
        (False, left.get_facecolor(), "unresolved"),
    ):
        here = found.resolved == known
        if not here.any():
            continue
        left.scatter(
            map.timesteps[here],
            size[here],
            facecolor=face,
            edgecolor=BLUE,
            s=28,
            zorder=3,
            label=label,
        )
    left.set(xlabel="timestep t", ylabel="length of the mean gradient", ylim=(0, None))
    left.legend(frameon=False)
    sns.lineplot(x=map.timesteps, y=found.noise, ax=right, color=ORANGE, marker="o")
    samples = map.M * map.origin.batch_size
    right.axhline(samples, color=GREY, lw=1, ls=":")
    axes = right.get_yaxis_transform()
    right.text(
        0.02, samples, f"{samples} samples were taken", transform=axes, fontsize=8, va="bottom"
    )
    right.set(
        xlabel="timestep t", ylabel="noise scale, samples", yscale="log", xlim=left.get_xlim()
    )
    for ax in (left, right):
        for place in partition.cuts if partition else []:
            ax.axvline(place, color=theme.ink, lw=1, ls="--", zorder=0)
    return figure


# -- task vectors --------------------------------------------------------------------------------------------------------


@styled
def task_vector_norms(vectors: TaskVectors, labels: Sequence[str]) -> Figure:
    """Draw |tau_k| on each tensor, in the order of the model, one line for each expert."""
    figure, (ax,) = _figure(width=9.6)
    table = (
        pd.DataFrame(vectors.norms, columns=list(labels))
        .rename_axis("tensor")
        .melt(ignore_index=False, var_name="expert", value_name="norm")
    )
    sns.lineplot(
        table.reset_index(),
        x="tensor",
        y="norm",
        hue="expert",
        style="expert",
        palette="colorblind",
        ax=ax,
        lw=1,
    )
    ax.set(xlabel="tensor, from input to output", ylabel="length of the task vector")
    ax.legend(frameon=False, title=None)
    return figure


@styled
def task_vector_similarity(vectors: TaskVectors, labels: Sequence[str]) -> Figure:
    """Draw cosines between task vectors and, beside them, the share of energy at opposed signs."""
    figure, axes = _figure(2, width=9.6, height=4.0)
    tables = (
        (vectors.cosine, "vlag", -1.0, "cosine"),
        (vectors.sign_conflict, "rocket_r", 0.0, "opposed in sign"),
    )
    for ax, (values, cmap, low, title) in zip(axes, tables, strict=True):
        frame = pd.DataFrame(values, index=list(labels), columns=list(labels))
        sns.heatmap(
            frame,
            ax=ax,
            cmap=cmap,
            vmin=low,
            vmax=1,
            annot=True,
            fmt=".2f",
            square=True,
            cbar=False,
        )
        ax.set_title(title, loc="left", fontsize=10)
    return figure
