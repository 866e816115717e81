"""Plots of a conflict map: a reading in, a matplotlib figure out.

Colours are of seaborn's `colorblind` and of maps that keep their order in grey. What is not
resolved is hatched, never coloured. Nothing touches pyplot's state.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from demerge.analysis.partitioning.bootstrap import drawn_cuts
from demerge.analysis.partitioning.cross_validation import RangeCount, cross_validation
from demerge.analysis.partitioning.map_reading import Reading
from demerge.analysis.partitioning.objective import ADAPTIVE
from demerge.analysis.report.summary import ConflictSummary
from demerge.analysis.similarity import Similarity, by_lag, by_log_snr
from demerge.conflict import Array, ConflictMap
from demerge.errors import NumericalError
from demerge.reporting.theme import BLUE, DARK, GREEN, GREY, LIGHT, ORANGE, Draw, Theme, styled
from demerge.timesteps import Partition

MANY = 40
LABELS = {"uniform": "uniform in t", "logsnr": "uniform in log SNR"}


def report_plots(summary: ConflictSummary) -> dict[str, Draw]:
    """Return what draws each plot of a summary, by file name; none for plots of nothing."""
    reading, partition = summary.reading, summary.partition
    method = summary.judged if summary.judged in ADAPTIVE else "gradient"
    plots: dict[str, Draw] = {"heatmap": partial(heat_map, reading, partition)}
    if cross_validation(reading, method).shares:
        plots["curve"] = partial(explained_share, reading, method, len(partition))
    if has_support(reading, len(partition), method):
        plots["support"] = partial(cut_support, reading, partition, method)
    if np.isfinite(reading.bins.cosine[np.triu_indices(reading.map.N, 1)]).any():
        plots["similarity"] = partial(similarity_by_distance, reading)
    plots["strength"] = partial(strength, reading, partition)
    return plots


def _axes(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


@styled
def heat_map(
    map: ConflictMap | Reading, partition: Partition | None = None, theme: Theme = LIGHT
) -> Figure:
    """Draw rho on and below the diagonal, its SE above, and cuts as lines.

    Unresolved bins are hatched, weak ones dotted.
    """
    reading = Reading.of(map)
    map, bins = reading.map, reading.bins
    figure, (ax,) = _axes(1, 7.4, 4.9)
    upper = np.triu(np.ones((map.N, map.N), dtype=bool), 1)
    se = np.where(upper, bins.cosine_se, np.nan)
    if np.isfinite(se).any():
        most = max(float(np.nanmax(se)), 1e-6)
        _mesh(ax, map, se, theme.greys, (0.0, most), "standard error (above the diagonal)")
    cosine = np.where(upper, np.nan, np.clip(bins.cosine, -1, 1))
    _mesh(ax, map, cosine, theme.maps, (-1.0, 1.0), "cosine of gradients (below)")
    _hatch(ax, map, bins, theme)
    for cut in partition.cuts if partition else []:
        ax.axvline(cut, color=theme.ink, lw=1.4, ls="--")
        ax.axhline(cut, color=theme.ink, lw=1.4, ls="--")
    ax.set(xlabel="timestep t (0 = least noise)", ylabel="timestep t", aspect="equal")
    ax.set(xlim=(0, map.T), ylim=(map.T, 0))
    unresolved, weak = int((~bins.resolved).sum()), int(bins.weak.sum())
    title = f"Gradient similarity: {map.N} bins, {map.M} groups of {map.origin.batch_size}"
    title += f", {unresolved} unresolved (hatched)" if unresolved else ""
    title += f", {weak} weak (dotted)" if weak else ""
    ax.set_title(title, loc="left", fontsize=10)
    return figure


def _mesh(
    ax: Axes, map: ConflictMap, values: Array, cmap: str, span: tuple[float, float], label: str
) -> None:
    masked, (low, high) = np.ma.masked_invalid(values), span
    mesh = ax.pcolormesh(map.edges, map.edges, masked, cmap=cmap, vmin=low, vmax=high)
    mesh.set_rasterized(map.N > MANY)
    bar = ax.figure.colorbar(mesh, ax=ax, label=label, shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)


def _hatch(ax: Axes, map: ConflictMap, bins: Similarity, theme: Theme) -> None:
    """Mark the cells of unresolved bins and, on and below the diagonal, those of weak ones."""
    face, edge = ("none", "0.4") if theme is DARK else ("0.96", "0.7")
    unresolved = ~np.isfinite(bins.cosine)
    weak = np.tril(bins.weak[:, None] | bins.weak) & ~unresolved
    for cells, hatch, colour in ((unresolved, "////", face), (weak, "...", "none")):
        y, x = np.nonzero(cells)
        if not len(x):
            continue
        left, right = np.array(map.edges)[x], np.array(map.edges)[x + 1]
        top, bottom = np.array(map.edges)[y], np.array(map.edges)[y + 1]
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        squares = np.array(corners).transpose(2, 0, 1)
        style = {"facecolor": colour, "edgecolor": edge, "linewidth": 0, "hatch": hatch}
        ax.add_collection(PolyCollection(squares, **style), autolim=False)  # type: ignore[arg-type]


@styled
def similarity_by_distance(map: ConflictMap | Reading, theme: Theme = LIGHT) -> Figure:
    """Draw the mean rho by lag of bins with its 95 % interval, and rho by distance in log SNR.

    The naive cosine is drawn next to the mean.
    """
    reading = Reading.of(map)
    map = reading.map
    figure, (left, right) = _axes(2, 9.6, 4.0)
    lags, pairs = by_lag(reading.bins, reading.pairs), by_log_snr(map, reading.bins)
    x = lags.lag * map.T / map.N
    label = "unbiased with 95 % interval, resolved pairs"
    left.plot(x, lags.cosine, color=BLUE, marker="o", ms=4, label=label)
    low, high = lags.cosine - lags.half, lags.cosine + lags.half
    left.fill_between(x, low, high, color=BLUE, alpha=0.2, lw=0)
    left.plot(x, lags.naive, color=ORANGE, ls="--", label="naive (biased), all pairs")
    left.set(xlabel="distance in timesteps", ylabel="cosine of gradients")
    left.set(ylim=_limits(lags.cosine, lags.naive))
    left.legend(frameon=False)
    palette = "cool" if theme is DARK else "viridis"
    points = right.scatter(pairs.distance, pairs.cosine, c=pairs.t, cmap=palette, s=18, lw=0)
    bar = figure.colorbar(points, ax=right, label="t of the lower bin", pad=0.02)
    bar.outline.set_visible(False)
    right.set(xlabel="distance in log SNR", ylim=_limits(pairs.cosine, lags.naive))
    for ax in (left, right):
        ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    left.set_title("Mean over resolved pairs of bins", loc="left", fontsize=10)
    right.set_title("Each resolved pair", loc="left", fontsize=10)
    return figure


def _limits(*series: pd.Series) -> tuple[float, float]:
    values = pd.concat(series)
    return min(-0.1, float(np.clip(values.min(), -1, 1)) - 0.1), 1.05


@styled
def strength(
    map: ConflictMap | Reading, partition: Partition | None = None, theme: Theme = LIGHT
) -> Figure:
    """Draw |mu_t| with its 95 % interval (unresolved bins open), and nu_t in samples."""
    reading = Reading.of(map)
    map, bins = reading.map, reading.bins
    figure, (left, right) = _axes(2, 9.6, 3.8)
    signal, half = np.diagonal(bins.K), np.diagonal(bins.K_half)
    size, low, high = (np.sqrt(np.clip(v, 0, None)) for v in (signal, signal - half, signal + half))
    spread = [size - low, high - size]
    left.errorbar(map.timesteps, size, spread, color=BLUE, lw=1, elinewidth=1, capsize=2)
    ground = left.get_facecolor()
    kinds = ((bins.resolved, BLUE, "resolved"), (~bins.resolved, ground, "unresolved"))
    for marked, face, label in kinds:
        if marked.any():
            style = {"facecolor": face, "edgecolor": BLUE, "s": 28, "zorder": 3, "label": label}
            left.scatter(map.timesteps[marked], size[marked], **style)
    left.set(xlabel="timestep t", ylabel="length of the mean gradient", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(map.timesteps, bins.noise, color=ORANGE, marker="o")
    samples = map.M * map.origin.batch_size
    right.axhline(samples, color=GREY, lw=1, ls=":")
    text = f"{samples} samples were taken"
    right.text(0.02, samples, text, transform=right.get_yaxis_transform(), fontsize=8, va="bottom")
    right.set(xlabel="timestep t", ylabel="noise scale, samples", yscale="log")
    right.set_xlim(left.get_xlim())
    for ax in (left, right):
        for cut in partition.cuts if partition else []:
            ax.axvline(cut, color=theme.ink, lw=1, ls="--", zorder=0)
    return figure


@styled
def explained_share(
    reading: Reading, method: str = "gradient", chosen: int | None = None, theme: Theme = LIGHT
) -> Figure:
    """Draw the share of the conflict that partitions explain on held-out groups, by their number.

    Pale: partitions that the map chose, judged on the groups that chose them.
    """
    count = cross_validation(reading, method)
    figure, (ax,) = _axes(1, 6.4, 4.2)
    looks = zip(count.shares.items(), (BLUE, ORANGE, GREEN), "os^", strict=bool(count.shares))
    for (name, shares), colour, marker in looks:
        values, errors = [each.value for each in shares], [each.se for each in shares]
        label = LABELS.get(name, f"{name}, held out")
        style = {"color": colour, "marker": marker, "ms": 5, "capsize": 2, "label": label}
        ax.errorbar(range(1, len(shares) + 1), values, errors, **style)
    _draw_seen(ax, reading, count)
    ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    if chosen:
        ax.axvline(chosen, color=GREY, lw=1, ls=":", zorder=0)
    ax.legend(frameon=False, loc="lower right", fontsize=9)
    ax.set(xlabel="number of ranges", ylabel=f"explained share of the conflict ({reading.score})")
    return figure


def _draw_seen(ax: Axes, reading: Reading, count: RangeCount) -> None:
    for method, shares in list(count.shares.items())[:1]:
        counts = range(1, len(shares) + 1)
        partitions = [reading.partition(n, method) for n in counts]
        seen = [reading.explained_share(each).value for each in partitions]
        label = f"{method}, on the groups it saw"
        ax.plot(counts, seen, color=BLUE, alpha=0.5, lw=1, ls="--", label=label)
        ax.set_xticks(counts)


def has_support(reading: Reading, n: int, method: str = "gradient") -> bool:
    """Return whether there are cuts whose places `cut_support` can show."""
    if n == 1 or not reading.is_sure:
        return False
    try:
        return len(drawn_cuts(reading, n, method)) > 0
    except NumericalError:
        return False


@styled
def cut_support(
    reading: Reading, partition: Partition, method: str = "gradient", theme: Theme = LIGHT
) -> Figure:
    """Draw how often the bootstrap puts a cut at each edge of bins; those taken as dashed lines."""
    map = reading.map
    draws = drawn_cuts(reading, len(partition), method)
    figure, (ax,) = _axes(1, 6.4, 3.0)
    edges = np.array(map.edges[1:-1])
    share = (draws[:, :, None] == edges).any(1).mean(0)
    ax.bar(edges, share, width=0.6 * map.T / map.N, color=BLUE)
    style: Any = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
    for cut in partition.cuts:
        ax.axvline(cut, color=theme.ink, lw=1.2, ls="--")
        ax.text(cut, 1, str(cut), fontsize=8, **style)
    ax.set(xlabel="timestep t (0 = least noise)", ylabel="share of draws with a cut here")
    ax.set(xlim=(0, map.T), ylim=(0, 1.02))
    return figure
