"""Plots: a value in, a figure out, for good maps and for maps that resolve nothing; equal bytes for equal maps."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from matplotlib import style
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from demerge.analysis.partitioning.cross_validation import cross_validation
from demerge.analysis.partitioning.map_reading import Reading
from demerge.analysis.report.plots import (
    cut_support,
    explained_share,
    has_support,
    heat_map,
    report_plots,
    similarity_by_distance,
    strength,
)
from demerge.analysis.report.summary import summarize
from demerge.analysis.similarity import similarity
from demerge.reporting.theme import DARK, LIGHT, Theme, render
from demerge.timesteps import Partition


@pytest.mark.parametrize(
    ("noise", "theme"),
    [(0.1, LIGHT), (1.0, DARK), (30.0, LIGHT)],
    ids=["resolved", "in part, dark", "unresolved"],
)
def test_figures_of_any_map_render_without_warnings(
    planted: Any, noise: float, theme: Theme
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots = report_plots(summarize(Reading(planted([0, 2, 4, 6], noise=noise)), 3))
        some = {"curve", "support", "similarity"}
        assert {"heatmap", "strength"} <= set(plots) <= {"heatmap", "strength", *some}
        assert len(some & set(plots)) == {0.1: 3, 30.0: 0}.get(noise, len(some & set(plots)))
        for draw in plots.values():
            figure = draw(theme)
            assert isinstance(figure, Figure) and len(render(figure, "png")) > 5000


def test_weak_bins_are_dotted_on_and_below_the_diagonal(map_of: Any) -> None:
    """A bin of some 4 standard errors is resolved, and may have passed by luck."""
    s = np.zeros((3, 8, 60))
    s[np.arange(3), :, np.arange(3)] = 5
    s[1, :, 1] = 1.1
    found = similarity(
        map := map_of(s + 0.5 * np.random.default_rng(0).standard_normal((3, 8, 60)))
    )
    assert found.resolved.all() and found.weak.tolist() == [False, True, False]
    ax = heat_map(map).axes[0]
    (dotted,) = [each for each in ax.collections if each.get_hatch() == "..."]
    corners = [tuple(path.vertices[0]) for path in dotted.get_paths()]
    assert corners == [(0, 333), (333, 333), (333, 667)]
    assert ax.get_title(loc="left").endswith(", 1 weak (dotted)")


def test_unresolved_bins_are_hatched_and_cuts_drawn(planted: Any) -> None:
    cuts = Partition.uniform(1000, 4)
    clear, dark = heat_map(planted([0, 4, 8]), cuts), heat_map(planted([0, 4, 8], noise=30.0), cuts)
    hatched = [
        sum(len(each.get_paths()) for each in figure.axes[0].collections if each.get_hatch())
        for figure in (clear, dark)
    ]
    assert hatched == [0, 64]
    assert [len(figure.axes) for figure in (clear, dark)] == [3, 2], (
        "no scale of errors where there are none"
    )
    assert len(clear.axes[0].lines) == 6
    assert "8 unresolved" in dark.axes[0].get_title(loc="left")


def test_a_dark_style_leaves_dark_ink_on_white(planted: Any) -> None:
    with style.context("dark_background"):
        figure = similarity_by_distance(planted([0, 4, 8]))
        assert to_hex(figure.get_facecolor()) == to_hex(figure.axes[0].get_facecolor()) == "#ffffff"
        texts = [
            *figure.axes[0].get_legend().get_texts(),
            figure.axes[0].title,
            figure.axes[0].xaxis.label,
        ]
        assert {to_hex(text.get_color()) for text in texts} == {LIGHT.ink, LIGHT.faint}
        render(figure, "png")
        assert {to_hex(label.get_color()) for label in figure.axes[0].get_xticklabels()} == {
            LIGHT.faint
        }


def test_a_dark_theme_lets_the_page_show_through(planted: Any) -> None:
    figure = strength(planted([0, 4, 8]), Partition.uniform(1000, 2), theme=DARK)
    assert figure.get_facecolor()[3] == figure.axes[0].get_facecolor()[3] == 0
    assert to_hex(figure.axes[0].xaxis.label.get_color()) == DARK.faint
    assert to_hex(figure.axes[0].lines[-1].get_color()) == DARK.ink


def test_explained_share_is_that_of_held_out_groups(planted: Any) -> None:
    reading = Reading(planted([0, 2, 4, 6, 16], noise=0.3))
    counted = cross_validation(reading)
    ax = explained_share(reading, "gradient", 4).axes[0]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(labels) == sorted(
        [
            "gradient, held out",
            "uniform in t",
            "uniform in log SNR",
            "gradient, on the groups it saw",
        ]
    )
    drawn = {container.get_label(): container.lines[0].get_ydata() for container in ax.containers}
    assert list(drawn["gradient, held out"]) == [
        share.value for share in counted.shares["gradient"]
    ]
    seen = next(line for line in ax.lines if line.get_label() == "gradient, on the groups it saw")
    assert seen.get_ydata()[2] > drawn["gradient, held out"][2], (
        "the groups that chose a cut flatter it"
    )


def test_support_stands_where_cuts_are_planted(planted: Any) -> None:
    reading = Reading(planted([0, 2, 5, 8]))
    ax = cut_support(reading, Partition.from_cuts(1000, [250, 625])).axes[0]
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in ax.patches}
    assert {place for place, height in heights.items() if height > 0.9} == {250, 625} and len(
        heights
    ) == 7
    assert [text.get_text() for text in ax.texts] == ["250", "625"]


def test_there_is_no_support_of_one_range_or_of_noise(planted: Any) -> None:
    assert has_support(Reading(planted([0, 4, 8])), 2)
    assert not has_support(Reading(planted([0, 4, 8])), 1)
    assert not has_support(Reading(planted([0, 4, 8], noise=30.0)), 4)


def test_equal_maps_give_equal_bytes(planted: Any) -> None:
    first, second = (render(heat_map(planted([0, 4, 8]))) for _ in range(2))
    assert first == second and first.startswith(b"<?xml")
