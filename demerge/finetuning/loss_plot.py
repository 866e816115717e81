"""The plot of an expert's losses; nothing touches pyplot's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import seaborn as sns
from matplotlib.figure import Figure

from demerge.reporting.theme import LIGHT, Theme, styled

FEW = 20  # lines of a log, of which each gets a marker


@styled
def draw_losses(
    lines: Sequence[Mapping[str, Any]], bins: Sequence[str], theme: Theme = LIGHT
) -> Figure:
    """Draw the loss of each bin of timesteps over the steps, and that of all as a dashed line."""
    figure = Figure(figsize=(7.4, 4.2))
    ax = figure.add_axes((0.1, 0.12, 0.7, 0.83))  # a layout engine would take longer than the rest
    marker = "o" if len(lines) <= FEW else ""
    for i, (name, colour) in enumerate(
        zip(bins, sns.color_palette("crest", len(bins)), strict=True)
    ):
        points = [(line["step"], line["loss_by_bin"][i]) for line in lines]
        points = [(step, loss) for step, loss in points if loss is not None]
        ax.plot(*_columns(points), color=colour, lw=1.2, marker=marker, ms=3, label=name)
    whole = [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]
    ax.plot(*_columns(whole), color=theme.ink, lw=1.4, ls="--", label="all")
    if any(loss > 0 for _, loss in whole):
        ax.set_yscale("log")
    ax.set(xlabel="step", ylabel="error of the prediction, unweighted")
    legend: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "fontsize": 8}
    ax.legend(frameon=False, title="timesteps", **legend)
    return figure


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]
