"""Plots of what layers gain from experts on ranges; a result of layers.py in, a figure out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from demerge.analysis.similarity import t_quantile
from demerge.reporting.theme import BLUE, GREEN, GREY, ORANGE, plain, styled

TOP = 20
LABELS = {"ranked": "by gain per parameter", "size": "smallest first", "random": "random"}


@styled
def gain_by_layer(said: dict[str, Any], top: int = TOP) -> Figure:
    """Draw the gain of the layers with the highest gain per parameter, and the held-out gain against the share that trains.

    Bars of layers that are to be trained are filled, those of others open; all intervals are of 95 %.

    Args:
        said: what `layers` returns.
        top: how many layers have a bar.
    """
    rows = said["layers"][:top]
    figure = Figure(figsize=(10.4, max(3.6, 1.3 + 0.24 * len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _bars(left, said, rows)
    _curve(right, said)
    for ax in (left, right):
        sns.despine(ax=ax)
    return figure


def _bars(ax: Axes, said: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    train, total, places = set(said["train"]), said["total"]["value"], np.arange(len(rows))
    scale, unit = (
        (100 / total, "% of that of all layers")
        if said["curve"]
        else (1.0, said["metric"] + " metric")
    )
    gains = scale * np.array([row["gain"] for row in rows])
    half = scale * t_quantile(said["groups"]) * np.array([row["se"] for row in rows])
    faces = [BLUE if row["name"] in train else "white" for row in rows]
    ax.barh(
        places,
        gains,
        height=0.7,
        color=faces,
        edgecolor=BLUE,
        xerr=half,
        error_kw={"ecolor": "0.3", "elinewidth": 1},
    )
    names = [f"{plain(row['name'])} ({row['parameters']:,})" for row in rows]
    ax.set_yticks(places, names, fontsize=8)
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"gain of experts, {unit}")
    ax.axvline(0, color=GREY, lw=0.8)
    ax.set_title("Highest gain per parameter (parameters)", loc="left", fontsize=10)


def _curve(ax: Axes, said: dict[str, Any]) -> None:
    ax.set(xlabel="share of the parameters that train", xlim=(0, 1))
    if not said["curve"]:
        ax.text(
            0.5,
            0.5,
            "no conflict between these ranges is resolved",
            ha="center",
            transform=ax.transAxes,
            fontsize=9,
        )
        return
    factor = t_quantile(said["groups"])
    for (order, label), colour, marker in zip(
        LABELS.items(), (BLUE, ORANGE, GREEN), "os^", strict=True
    ):
        table = pd.DataFrame([{"share": row["share"], **row[order]} for row in said["curve"]])
        ax.plot(table.share, table.value, color=colour, marker=marker, ms=4, label=label)
        ax.fill_between(
            table.share,
            table.value - factor * table.se,
            table.value + factor * table.se,
            color=colour,
            alpha=0.15,
        )
    ax.axvline(said["share"], color=GREY, lw=1, ls=":", zorder=0)
    ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    ax.set(ylabel="share of the gain, held out")
    ax.legend(frameon=False, loc="lower right")
    ax.set_title("What a part of the layers gains", loc="left", fontsize=10)
