"""Figures of partitions: what they explain by number of ranges, and how sure their places are."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from demerge.analysis.partitioning.bootstrap import drawn_cuts
from demerge.analysis.partitioning.cross_validation import RangeCount, cross_validation
from demerge.analysis.partitioning.map_reading import Reading
from demerge.errors import NumericalError
from demerge.reporting.theme import BLUE, GREEN, GREY, LIGHT, ORANGE, Theme, styled
from demerge.timesteps import Partition

LABELS = {"uniform": "uniform in t", "logsnr": "uniform in log SNR"}


@styled
def explained_share(
    reading: Reading, method: str = "gradient", chosen: int | None = None, theme: Theme = LIGHT
) -> Figure:
    """Draw the share of the conflict that partitions explain on held-out groups, by their number.

    Next to the three methods, pale: partitions that the map chose, judged on the groups that chose
    them.
    """
    count = cross_validation(reading, method)
    figure, ax = _axes(4.2)
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
    figure, ax = _axes(3.0)
    places = np.array(map.edges[1:-1])
    share = (draws[:, :, None] == places).any(1).mean(0)
    ax.bar(places, share, width=0.6 * map.T / map.N, color=BLUE)
    for place in partition.cuts:
        ax.axvline(place, color=theme.ink, lw=1.2, ls="--")
        at: Any = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        ax.text(place, 1, str(place), fontsize=8, **at)
    ax.set(xlabel="timestep t (0 = least noise)", ylabel="share of draws with a cut here")
    ax.set(xlim=(0, map.T), ylim=(0, 1.02))
    return figure


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height), layout="constrained")
    return figure, figure.add_subplot()
