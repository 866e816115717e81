"""Plots of task vectors by block and of the losses around a base; what noise does not tell from the base is marked.

Blue is a lower loss than the base's, red a higher one, white the same; the line around a valley is the base's own loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from demerge.analysis.experts.landscape import PATH, PLANE, Landscape
from demerge.analysis.experts.taskvectors import TaskVectors
from demerge.analysis.plots import GREY
from demerge.analysis.similarity import t_quantile
from demerge.conflict import Array
from demerge.errors import UsageError
from demerge.evaluate.losses import BLOCKS
from demerge.figures import plain, styled

COLUMNS = 4
MARKERS = "osD^vP*X"


@styled
def loss_along_path(path: Landscape, label: str = "merged") -> Figure:
    """Draw the change of each range's loss from the base (s = 0) to the merged model (s = 1), with 95 % intervals.

    Raises:
        UsageError: where the landscape is no path.
    """
    _require(path, PATH)
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
    for place, text in ((0, "base"), (1, plain(label))):
        ax.axvline(place, color=GREY, lw=0.8, ls=":", zorder=0)
        ax.annotate(text, (place, 1), xycoords=("data", "axes fraction"), fontsize=8, xytext=(2, 2), textcoords="offset points")
    ax.set(xlabel="s, the way from the base to the merged model", ylabel="held-out loss against the base, %")
    ax.legend(frameon=False, title="range of timesteps", fontsize=8)
    sns.despine(ax=ax)
    return figure


@styled
def loss_on_plane(plane: Landscape, labels: Sequence[str] = ("expert i", "expert j")) -> Figure:
    """Draw the change of each range's loss over the coefficients of two experts, a panel for each range, on one scale.

    Points that are not told apart from the base at 95 % carry a cross.

    Raises:
        UsageError: where the landscape is no plane, or there are not two labels.
    """
    _require(plane, PLANE)
    if len(labels) != 2:
        raise UsageError(f"{len(labels)} labels for two experts", fix="give two")
    R, changes = len(plane.ranges), 100 * plane.table().change.to_numpy()
    columns = min(R, COLUMNS)
    rows = -(-R // columns)
    figure = Figure(figsize=(2.9 * columns + 0.9, 2.9 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    norm = TwoSlopeNorm(0, *_limits(changes))
    for ax, name in zip(axes, plane.ranges, strict=False):
        mesh = _panel(ax, plane, name, norm)
    for ax in axes[R:]:
        ax.set_axis_off()
    figure.colorbar(mesh, ax=axes.tolist(), label="held-out loss against the base, %", extend="both", shrink=0.9)
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
    for text, place in (("base", (0, 0)), ("i", (1, 0)), ("j", (0, 1))):
        ax.annotate(text, place, ha="center", va="center", fontsize=8, bbox={"boxstyle": "round", "fc": "white", "ec": "0.4"})
    ax.set_title(name, loc="left", fontsize=10)
    ax.set_aspect("equal")
    return mesh


def _limits(values: Array) -> tuple[float, float]:
    """Return limits around 0 that the wildest tenth may pass, so that overshoot does not hide the valley."""
    limit = max(0.1, float(np.quantile(abs(values), 0.9)))
    return -limit, limit


@styled
def norms_by_block(vectors: TaskVectors, labels: Sequence[str]) -> Figure:
    """Draw |tau_k| for each block of the denoiser and expert, the effective rank of the experts beside it.

    Raises:
        UsageError: where there is not one label for each expert.
    """
    blocks = vectors.by_block()
    table = blocks.table(labels)
    names = [plain(name) for name in blocks.names]
    norms = pd.DataFrame(blocks.norms, index=names, columns=[plain(label) for label in labels])
    figure = Figure(figsize=(3.4 + 0.9 * len(labels) + 2.4, 1.4 + 0.34 * len(norms)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(0.9 * len(labels) + 1, 2.4), sharey=False)
    sns.heatmap(norms, ax=left, cmap="viridis", annot=True, fmt=".2g", cbar_kws={"label": "length of the task vector"})
    left.set(xlabel="expert", ylabel="")
    left.tick_params(axis="y", rotation=0, length=0)
    places = np.arange(len(norms)) + 0.5
    right.barh(places, table.effective_rank, color=sns.color_palette("colorblind")[0], height=0.7)
    right.set(xlim=(0, len(labels)), ylim=(len(norms), 0), xlabel=f"effective rank, of {len(labels)}", yticks=[])
    sns.despine(ax=right, left=True)
    return figure


def _require(landscape: Landscape, axes: tuple[str, ...]) -> None:
    if landscape.axes != axes:
        raise UsageError(f"the landscape is over {landscape.axes}, not over {axes}", fix="draw it by the other function")
