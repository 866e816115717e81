"""Plots of task vectors, of the losses around a base, and of predictions; noise is marked as noise.

Blue is a lower loss than the base's, red a higher one, white the same. The line around a valley is
the base's own loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from demerge.analysis.experts.first_order import Transfer
from demerge.analysis.experts.loss_landscape import Landscape
from demerge.analysis.experts.task_vectors import TaskVectors
from demerge.analysis.similarity import t_quantile
from demerge.evaluation.metrics.range_losses import BLOCKS
from demerge.merging.blocks import group_by_block
from demerge.reporting.theme import GREY, plain, styled

COLUMNS = 4
MARKERS = "osD^vP*X"
CHANGE = "held-out loss against the base, %"


@styled
def draw_path(path: Landscape, label: str = "merged") -> Figure:
    """Draw the change of each range's loss from the base (s = 0) to the merged model (s = 1)."""
    table, factor = path.table(), t_quantile(BLOCKS)
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    ax = figure.add_subplot()
    colours = sns.color_palette("colorblind", len(path.ranges))
    for k, (name, colour) in enumerate(zip(path.ranges, colours, strict=True)):
        rows = table[table.range == name].sort_values("s")
        change, half = 100 * rows.change, 100 * factor * rows.se
        ax.plot(rows.s, change, color=colour, marker=MARKERS[k % len(MARKERS)], ms=5, label=name)
        ax.fill_between(rows.s, change - half, change + half, color=colour, alpha=0.18, lw=0)
    ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    corner: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    for s, text in ((0, "base"), (1, plain(label))):
        ax.axvline(s, color=GREY, lw=0.8, ls=":", zorder=0)
        ax.annotate(text, (s, 1), xytext=(2, 2), fontsize=8, **corner)
    ax.set(xlabel="s, the way from the base to the merged model", ylabel=CHANGE)
    ax.legend(frameon=False, title="range of timesteps", fontsize=8)
    sns.despine(ax=ax)
    return figure


@styled
def draw_plane(plane: Landscape, labels: Sequence[str] = ("expert i", "expert j")) -> Figure:
    """Draw the change of each range's loss over the coefficients of two experts, on one scale.

    Points that are not distinguishable from the base at 95 % carry a cross.
    """
    R, changes = len(plane.ranges), 100 * plane.table().change.to_numpy()
    columns = min(R, COLUMNS)
    rows = -(-R // columns)
    figure = Figure(figsize=(2.9 * columns + 0.9, 2.9 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    limit = max(0.1, float(np.quantile(abs(changes), 0.9)))  # overshoot must not hide the valley
    for ax, name in zip(axes, plane.ranges, strict=False):
        mesh = _panel(ax, plane, name, TwoSlopeNorm(0, -limit, limit))
    for ax in axes[R:]:
        ax.set_axis_off()
    figure.colorbar(mesh, ax=axes.tolist(), label=CHANGE, extend="both", shrink=0.9)
    figure.supxlabel(f"coefficient of {plain(labels[0])}", fontsize=10)
    figure.supylabel(f"coefficient of {plain(labels[1])}", fontsize=10)
    return figure


def _panel(ax: Axes, plane: Landscape, name: str, norm: TwoSlopeNorm) -> QuadMesh:
    x, y, change = plane.grid("change", name)
    se = plane.grid("se", name)[2]
    mesh = ax.pcolormesh(x, y, 100 * change, cmap="vlag", norm=norm, shading="nearest")
    if min(change.shape) > 1 and change.min() < 0 < change.max():
        ax.contour(x, y, change, levels=[0], colors="black", linewidths=1.2)
    at_y, at_x = np.nonzero(abs(change) <= t_quantile(BLOCKS) * se)
    ax.scatter(x[at_x], y[at_y], marker="x", s=14, color="0.35", lw=0.8)
    box = {"boxstyle": "round", "fc": "white", "ec": "0.4"}
    for text, point in (("base", (0, 0)), ("i", (1, 0)), ("j", (0, 1))):
        ax.annotate(text, point, ha="center", va="center", fontsize=8, bbox=box)
    ax.set_title(name, loc="left", fontsize=10)
    ax.set_aspect("equal")
    return mesh


@styled
def draw_norms_by_block(vectors: TaskVectors, labels: Sequence[str]) -> Figure:
    """Draw |tau_k| for each block of the denoiser and expert, and the effective rank next to it."""
    blocks, K = vectors.by_block(), len(labels)
    table, names = blocks.table(labels), [plain(name) for name in blocks.names]
    norms = pd.DataFrame(blocks.norms, index=names, columns=[plain(label) for label in labels])
    size = (5.8 + 0.9 * K, 1.4 + 0.34 * len(norms))
    figure = Figure(figsize=size, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(0.9 * K + 1, 2.4), sharey=False)
    bar = {"label": "length of the task vector"}
    sns.heatmap(norms, ax=left, cmap="viridis", annot=True, fmt=".2g", cbar_kws=bar)
    left.set(xlabel="expert", ylabel="")
    left.tick_params(axis="y", rotation=0, length=0)
    middles = np.arange(len(norms)) + 0.5
    right.barh(middles, table.effective_rank, color=sns.color_palette("colorblind")[0], height=0.7)
    right.set(xlim=(0, K), ylim=(len(norms), 0), xlabel=f"effective rank, of {K}", yticks=[])
    sns.despine(ax=right, left=True)
    return figure


@styled
def draw_norms_by_layer(vectors: TaskVectors, labels: Sequence[str]) -> Figure:
    """Draw |tau_k| for each layer and expert, from input to output, on a logarithmic scale."""
    layers = vectors.by_layer()
    order: list[tuple[str, int]] = []
    for block, names in group_by_block(layers.names).items():
        order += [(block, layers.names.index(name)) for name in names]
    norms = layers.norms[[i for _, i in order]]
    known = np.ma.masked_less_equal(norms, 0)
    limits = (float(known.min()), float(known.max())) if known.count() else (0.1, 1.0)
    figure = Figure(figsize=(2.6 + 0.9 * len(labels), 6.5), layout="constrained")
    ax = figure.add_subplot()
    norm = LogNorm(limits[0], max(limits[1], 1.001 * limits[0]))
    mesh = ax.pcolormesh(known, cmap="viridis", norm=norm, rasterized=True)
    starts = [p for p, (block, _) in enumerate(order) if p == 0 or order[p - 1][0] != block]
    middles = [(a + b) / 2 for a, b in zip(starts, [*starts[1:], len(order)], strict=True)]
    for start in starts[1:]:
        ax.axhline(start, color="white", lw=1.2)
    ax.set(xlabel="expert", ylabel=f"{len(order)} layers, by block")
    ax.set(ylim=(len(order), 0), facecolor="0.9")
    ax.set_yticks(middles, [plain(order[p][0]) for p in starts])
    ax.set_xticks(np.arange(len(labels)) + 0.5, [plain(label) for label in labels])
    ax.tick_params(length=0)
    figure.colorbar(mesh, ax=ax, label="length of the task vector")
    sns.despine(ax=ax, left=True, bottom=True)
    return figure


@styled
def draw_transfer(transfer: Transfer) -> Figure:
    """Draw the predicted changes of the loss with 95 % intervals; unresolved cells are hatched.

    Losses of ranges have no common scale: a colour is a share of its range's largest change.
    """
    changes, labels = transfer.changes, [plain(name) for name in transfer.names]
    K, R = changes.value.shape
    known = np.where(changes.resolved, changes.value, np.nan)
    largest = np.nanmax(abs(known), axis=0, initial=0.0)
    shares = np.divide(known, largest, out=np.full_like(known, np.nan), where=largest > 0)
    size = (2.6 + 1.35 * R + 0.05 * max(map(len, labels)), 1.7 + 0.55 * K)
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.add_subplot()
    grid: dict[str, Any] = {"edgecolors": "white", "linewidth": 1.5}
    mesh = ax.pcolormesh(np.ma.masked_invalid(shares), cmap="vlag", vmin=-1, vmax=1, **grid)
    hatch: dict[str, Any] = {"facecolor": "0.96", "edgecolor": "0.75", "hatch": "////", "lw": 0}
    pale = {"boxstyle": "round,pad=0.15", "fc": "0.96", "ec": "none"}
    for (k, r), is_resolved in np.ndenumerate(changes.resolved):
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": "0.15"}
        if not is_resolved:
            ax.add_patch(Rectangle((r, k), 1, 1, **hatch))
            style["bbox"] = pale
        elif abs(shares[k, r]) > 0.5:
            style["color"] = "white"
        text = f"{changes.value[k, r]:+.1e}\n± {changes.half[k, r]:.1e}"
        ax.annotate(text, (r + 0.5, k + 0.5), **style)
    ax.set(xlabel="range of timesteps", ylabel="expert", xlim=(0, R), ylim=(K, 0))
    ax.set_xticks(np.arange(R) + 0.5, [str(span) for span in transfer.ranges])
    ax.set_yticks(np.arange(K) + 0.5, labels)
    ax.tick_params(length=0)
    title = "Predicted first-order change of the loss; unresolved hatched"
    ax.set_title(title, loc="left", fontsize=10)
    figure.colorbar(mesh, ax=ax, label="share of the range's largest change", ticks=[-1, 0, 1])
    sns.despine(ax=ax, left=True, bottom=True)
    return figure
