"""The plots of a report; each is drawn for light and for dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from demerge.evaluation.metrics.range_losses import RangeLosses
from demerge.evaluation.scores import Row
from demerge.reporting.theme import KINDS, LIGHT, Theme, plain, styled

CELL = 0.66  # inches of an image on the contact sheet


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


@styled
def ranking(rows: Sequence[Row], floors: Sequence[Row], theme: Theme = LIGHT) -> Figure:
    """Draw each model's distance: a dot per seed, mean and sd, base and noise floor as lines."""
    figure, axes = _axes(8.0, 0.9 + 0.36 * len(rows))
    seeds = sorted({seed for row in rows for seed in row.seeds})
    for seed in seeds if len(seeds) > 1 else ():
        places = [y for y, row in enumerate(rows) if seed in row.seeds]
        values = [rows[y].by_seed("fd")[seed] for y in places]
        axes.plot(values, places, color=theme.faint, lw=0.6, alpha=0.5, marker="o", ms=3, zorder=1)
    for y, row in enumerate(rows):
        mean, spread = row.mean("fd"), 0.0 if math.isnan(row.sd("fd")) else row.sd("fd")
        bars = axes.errorbar(mean, y, xerr=spread, fmt="o", ms=8, capsize=3, color=KINDS[row.kind])
        bars[0].set(mec=theme.ink, mew=0.6)
        if row.kind == "base":
            axes.axvline(mean, color=KINDS["base"], lw=1, ls="--", zorder=0)
    for floor in floors:
        axes.axvline(floor.mean("fd"), color=theme.faint, lw=1.2, ls=":", zorder=0)
        axes.annotate(
            "noise floor", (floor.mean("fd"), 1), xycoords=("data", "axes fraction"),
            xytext=(3, 3), textcoords="offset points", color=theme.faint, fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [plain(f"{i}  {row.model}") for i, row in enumerate(rows, 1)])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _scale(axes, [row.mean("fd") for row in [*rows, *floors]])
    axes.set(xlabel=f"{rows[0].protocol.title} (lower is better)", ylabel="")
    axes.grid(axis="x", color=theme.line, lw=0.6, alpha=0.7)
    return figure


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Take a logarithmic axis with plain numbers if the values span more than a factor of 12."""
    if min(values) > 0 and max(values) / min(values) > 12:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


@styled
def tradeoff(rows: Sequence[Row], theme: Theme = LIGHT) -> Figure:
    """Draw precision against recall, one dot for each model with its place in the ranking."""
    figure, axes = _axes(6.2, 4.4)
    records = [(row.kind, row.mean("recall"), row.mean("precision")) for row in rows]
    frame = pd.DataFrame(records, columns=["kind", "recall", "precision"])
    look = {"palette": dict(KINDS), "s": 70, "ec": theme.ink, "lw": 0.5}
    sns.scatterplot(frame, x="recall", y="precision", hue="kind", ax=axes, **look)
    places: dict[tuple[float, float], list[str]] = {}
    for place, (_, recall, precision) in enumerate(records, 1):
        places.setdefault((recall, precision), []).append(str(place))
    for position, names in places.items():
        axes.annotate(
            ", ".join(names), position, xytext=(6, 4), textcoords="offset points",
            fontsize=8, color=theme.ink,
        )  # fmt: skip
    axes.legend(title=None, frameon=False, fontsize=8, labelcolor=theme.ink)
    axes.margins(0.12)
    axes.grid(color=theme.line, lw=0.6, alpha=0.7)
    axes.set_xlabel("recall: share of real images covered")
    axes.set_ylabel("precision: share of images that look real")
    return figure


@styled
def losses(rows: Sequence[Row], base: RangeLosses, theme: Theme = LIGHT) -> Figure:
    """Draw each range's change of loss in percent; faint numbers have an interval that covers 0."""
    changes, certain = {}, []
    for row in rows:
        if row.losses is not None and row.losses.is_paired(base):
            change = row.losses.change(base)
            changes[plain(row.model)] = {span: 100 * each.value for span, each in change.items()}
            certain += [each.is_certain for each in change.values()]
    frame = pd.DataFrame.from_dict(changes, orient="index")
    figure, axes = _axes(2.6 + 1.1 * frame.shape[1], 1.0 + 0.36 * len(frame))
    limit = max(0.5, float(np.nanpercentile(np.abs(frame.to_numpy()), 85)))
    sns.heatmap(
        frame,
        ax=axes,
        cmap=theme.maps,
        norm=TwoSlopeNorm(0, -limit, limit),
        annot=True,
        fmt="+.2f",
        linewidths=1.5,
        linecolor="none",
        cbar_kws={"label": "loss against base, %", "extend": "both"},
    )
    for text, is_certain in zip(axes.texts, certain, strict=True):
        if not is_certain:
            text.set(alpha=0.45, fontstyle="italic")
    axes.set(xlabel="range of timesteps (left: least noise)", ylabel="")
    axes.tick_params(length=0, axis="both")
    axes.tick_params(axis="y", rotation=0)
    kinds = {plain(row.model): row.kind for row in rows}
    for label in axes.get_yticklabels():
        label.set_color(KINDS[kinds[label.get_text()]])
    return figure


@styled
def contact_sheet(
    images: Mapping[str, Tensor], kinds: Mapping[str, str], theme: Theme = LIGHT
) -> Figure:
    """Draw a row of images, uint8 [n C H W], for each model; one column is one noise."""
    columns = max(map(len, images.values()))
    room = 0.15 + 0.08 * max(len(plain(name)) for name in images)
    width, height = room + CELL * columns, CELL * len(images)
    figure, side = Figure(figsize=(width, height)), 0.94 * CELL
    for i, (name, row) in enumerate(images.items()):
        for j, image in enumerate(row):
            left, bottom = (room + j * CELL) / width, 1 - (i + 1) * CELL / height
            axes = figure.add_axes((left, bottom, side / width, side / height))
            axes.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), aspect="auto")
            axes.set_axis_off()
        x, y = (room - 0.08) / width, 1 - (i + 0.5) / len(images)
        ink = KINDS.get(kinds.get(name, ""), theme.ink)
        figure.text(x, y, plain(name), ha="right", va="center", color=ink, fontsize=9)
    return figure
