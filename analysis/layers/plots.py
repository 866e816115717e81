"""Plots of what layers gain from experts on ranges."""

from __future__ import annotations

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from demerge.analysis.layers.gains import LayerChoice
from demerge.analysis.similarity import t_quantile
from demerge.reporting.theme import BLUE, GREEN, GREY, ORANGE, plain, styled

TOP = 20
LABELS = {"ranked": "by gain per parameter", "size": "smallest first", "random": "random"}


@styled
def draw_gains(choice: LayerChoice, top: int = TOP) -> Figure:
    """Draw the layers with the highest gain per parameter, and the held-out gain by trained share.

    Bars of layers that are to be trained are filled, those of others open. Intervals are of 95 %.
    """
    height = max(3.6, 1.3 + 0.24 * min(top, len(choice.layers)))
    figure = Figure(figsize=(10.4, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_bars(left, choice, top)
    _draw_curve(right, choice)
    for ax in (left, right):
        sns.despine(ax=ax)
    return figure


def _draw_bars(ax: Axes, choice: LayerChoice, top: int) -> None:
    layers = choice.layers[:top]
    train, rows = set(choice.train), np.arange(len(layers))
    scale, unit = 1.0, f"{choice.metric} metric"
    if choice.curve:
        scale, unit = 100 / choice.total.value, "% of that of all layers"
    gains = scale * np.array([layer.gain for layer in layers])
    half = scale * t_quantile(choice.groups) * np.array([layer.se for layer in layers])
    faces = [BLUE if layer.name in train else "white" for layer in layers]
    whiskers = {"ecolor": "0.3", "elinewidth": 1}
    style = {"height": 0.7, "edgecolor": BLUE, "error_kw": whiskers}
    ax.barh(rows, gains, color=faces, xerr=half, **style)
    names = [f"{plain(layer.name)} ({layer.parameters:,})" for layer in layers]
    ax.set_yticks(rows, names, fontsize=8)
    ax.set(ylim=(len(layers) - 0.4, -0.6), xlabel=f"gain of experts, {unit}")
    ax.axvline(0, color=GREY, lw=0.8)
    ax.set_title("Highest gain per parameter (parameters)", loc="left", fontsize=10)


def _draw_curve(ax: Axes, choice: LayerChoice) -> None:
    ax.set(xlabel="share of the parameters that train", xlim=(0, 1))
    if not choice.curve:
        text = "no conflict between these ranges is resolved"
        ax.text(0.5, 0.5, text, ha="center", transform=ax.transAxes, fontsize=9)
        return
    shares, rows = np.array(list(choice.curve)), list(choice.curve.values())
    styles = zip(LABELS.items(), (BLUE, ORANGE, GREEN), "os^", strict=True)
    for (order, label), colour, marker in styles:
        value = np.array([row[order].value for row in rows])
        half = t_quantile(choice.groups) * np.array([row[order].se for row in rows])
        ax.plot(shares, value, color=colour, marker=marker, ms=4, label=label)
        ax.fill_between(shares, value - half, value + half, color=colour, alpha=0.15)
    ax.axvline(choice.share, color=GREY, lw=1, ls=":", zorder=0)
    ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    ax.set(ylabel="share of the gain, held out")
    ax.legend(frameon=False, loc="lower right")
    ax.set_title("What a part of the layers gains", loc="left", fontsize=10)
