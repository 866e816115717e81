"""Figures of cuts: what they explain by number of ranges, and how sure their places are; readable on any ground."""

from __future__ import annotations

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from demerge.analysis.partitioning.bootstrap import Evidence, curve
from demerge.analysis.partitioning.cross_validation import Count
from demerge.conflict import Array
from demerge.errors import NumericalError
from demerge.reporting.theme import BLUE, GREEN, GREY, LIGHT, ORANGE, Theme, styled
from demerge.timesteps import Partition

WAYS = {"uniform": "uniform in t", "logsnr": "uniform in log SNR"}
EMPTY = "nothing to show"


@styled
def explained_share(
    evidence: Evidence, counted: Count, chosen: int | None = None, *, theme: Theme = LIGHT
) -> Figure:
    """Draw the share of the conflict that cuts explain on held-out groups against the number of ranges, with SE.

    Beside the three ways to cut, pale: cuts that the map chose, judged on the groups that chose them.
    """
    figure, ax = _figure(4.2)
    if counted.shares:
        _held_out(ax, counted)
        _seen(ax, evidence, counted)
        ax.legend(frameon=False, loc="lower right", fontsize=9)
    else:
        _nothing(ax)
        ax.set(xticks=[], yticks=[])
    ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    if chosen and counted.shares:
        ax.axvline(chosen, color=GREY, lw=1, ls=":", zorder=0)
    ax.set(xlabel="number of ranges", ylabel=f"explained share of the conflict ({evidence.score})")
    return figure


def _held_out(ax: Axes, counted: Count) -> None:
    for (method, shares), colour, marker in zip(
        counted.shares.items(), (BLUE, ORANGE, GREEN), "os^", strict=True
    ):
        counts, values, errors = zip(
            *((k, share.value, share.se) for k, share in enumerate(shares, 1)), strict=True
        )
        label = WAYS.get(method, f"{method}, held out")
        ax.errorbar(
            counts, values, errors, color=colour, marker=marker, ms=5, capsize=2, label=label
        )
        ax.set_xticks(counts)


def _seen(ax: Axes, evidence: Evidence, counted: Count) -> None:
    looks, shares = next(iter(counted.shares.items()))
    seen = curve(evidence, range(1, len(shares) + 1))
    seen = seen[seen.method == looks]
    ax.plot(
        seen.ranges,
        seen.share,
        color=BLUE,
        alpha=0.5,
        lw=1,
        ls="--",
        label=f"{looks}, on the groups it saw",
    )


@styled
def cut_support(
    evidence: Evidence,
    partition: Partition,
    method: str = "gradient",
    minimum: int | None = None,
    *,
    theme: Theme = LIGHT,
) -> Figure:
    """Draw how often the bootstrap over groups puts a cut at each edge of bins; the cuts that were taken as dashed lines."""
    map = evidence.map
    figure, ax = _figure(3.0)
    draws = _draws(evidence, len(partition), method, minimum)
    if len(partition) == 1:
        _nothing(ax, "nothing was cut")
    elif not len(draws):
        _nothing(ax)
    else:
        places = np.array(map.edges[1:-1])
        share = (draws[:, :, None] == places).any(1).mean(0)
        ax.bar(places, share, width=0.6 * map.T / map.N, color=BLUE)
    for place in partition.cuts:
        ax.axvline(place, color=theme.ink, lw=1.2, ls="--")
        ax.annotate(
            str(place),
            (place, 1),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            ha="center",
            va="bottom",
        )
    ax.set(
        xlabel="timestep t (0 = least noise)",
        ylabel="share of draws with a cut here",
        xlim=(0, map.T),
        ylim=(0, 1.02),
    )
    return figure


def _draws(evidence: Evidence, n: int, method: str, minimum: int | None) -> Array:
    """Return the cuts of bootstrap draws, none where noise leaves nothing to cut by."""
    if n == 1 or not evidence.sure:
        return np.empty((0, 0))
    try:
        return evidence.bootstrap(n, method, minimum)
    except NumericalError:
        return np.empty((0, 0))


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height), layout="constrained")
    ax = figure.add_subplot()
    sns.despine(ax=ax)
    return figure, ax


def _nothing(ax: Axes, why: str = "too little of the conflict is resolved") -> None:
    """Say that there is nothing to show, and let the figure's label say so to `figures`."""
    ax.text(0.5, 0.5, why, ha="center", transform=ax.transAxes)
    ax.figure.set_label(EMPTY)
