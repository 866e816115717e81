"""A plot of the study: how the two cosines change as samples are added, and the truth."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from demerge.analysis.study.estimators import PLUG_IN, UNBIASED
from demerge.reporting.theme import BLUE, GREY, ORANGE, styled

STYLES = {PLUG_IN: (ORANGE, "s", "--"), UNBIASED: (BLUE, "o", "-")}


@styled
def draw_neighbours(table: pd.DataFrame, truth: float | None = None) -> Figure:
    """Draw the table of `compare_by_samples` with 95 % intervals; a known truth is a line."""
    kinds, ticks = list(table.draws.unique()), sorted(table.samples.unique())
    figure = Figure(figsize=(4.8 * len(kinds), 3.8), layout="constrained")
    axes = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    for ax, kind in zip(axes, kinds, strict=True):
        _panel(ax, table[table.draws == kind])
        if truth is not None:
            ax.axhline(truth, color=GREY, lw=1.2, ls=":", zorder=0, label=f"truth, {truth:.2f}")
        ax.set_title(f"{kind} draws", loc="left", fontsize=10)
        ax.set(xlabel="samples for each bin", xscale="log")
        ax.set_ylabel("mean cosine of neighbours" if ax is axes[0] else "")
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        sns.despine(ax=ax)
    axes[0].legend(frameon=False, loc="best", fontsize=9)
    return figure


def _panel(ax: Axes, table: pd.DataFrame) -> None:
    for name, (colour, marker, line) in STYLES.items():
        rows = table[table.estimator == name].dropna(subset=["cosine"])
        label = f"{name} (resolved bins)" if name == UNBIASED else name
        style = {"color": colour, "marker": marker, "ls": line, "label": label, "capsize": 2}
        ax.errorbar(rows.samples, rows.cosine, rows.half, ms=5, lw=1.4, elinewidth=1, **style)
