"""Plots: a value in, a figure out, for good maps and for maps that resolve nothing; equal bytes for equal maps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from matplotlib import style
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from demerge.analysis.experts.taskvectors import task_vectors
from demerge.analysis.plots import figures, heat_map, render, similarity_by_distance, task_vector_norms, task_vector_similarity
from demerge.timesteps import Partition


@pytest.mark.parametrize("noise", [0.1, 1.0, 30.0], ids=["resolved", "in part", "unresolved"])
def test_figures_of_any_map_render_without_warnings(planted: Any, noise: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figures(planted([0, 2, 5, 8], noise=noise), Partition.uniform(1000, 3))
        assert set(drawn) == {"heatmap", "similarity", "strength", "curve"}
        assert all(isinstance(figure, Figure) and len(render(figure, "png")) > 5000 for figure in drawn.values())


def test_unresolved_bins_are_hatched_and_cuts_drawn(planted: Any) -> None:
    cuts = Partition.uniform(1000, 4)
    clear, dark = heat_map(planted([0, 4, 8]), cuts), heat_map(planted([0, 4, 8], noise=30.0), cuts)
    assert [len(figure.axes[0].patches) for figure in (clear, dark)] == [0, 64]
    assert len(clear.axes[0].lines) == 6
    assert "8 unresolved" in dark.axes[0].get_title(loc="left")


def test_a_dark_style_leaves_dark_ink_on_white(planted: Any) -> None:
    with style.context("dark_background"):
        figure = similarity_by_distance(planted([0, 4, 8]))
        assert to_hex(figure.get_facecolor()) == to_hex(figure.axes[0].get_facecolor()) == "#ffffff"
        texts = [*figure.axes[0].get_legend().get_texts(), figure.axes[0].title, figure.axes[0].xaxis.label]
        assert {to_hex(text.get_color()) for text in texts} == {"#262626"}
        render(figure, "png")
        assert {to_hex(label.get_color()) for label in figure.axes[0].get_xticklabels()} == {"#262626"}


def test_equal_maps_give_equal_bytes(planted: Any) -> None:
    first, second = (render(heat_map(planted([0, 4, 8]))) for _ in range(2))
    assert first == second and first.startswith(b"<?xml")


def test_task_vectors_are_drawn() -> None:
    base = {"a": torch.zeros(4), "b": torch.zeros(3)}
    vectors = task_vectors(base, [{n: t + k for n, t in base.items()} for k in (0.0, 1.0, -2.0)])
    for figure in (task_vector_norms(vectors, "xyz"), task_vector_similarity(vectors, "xyz")):
        assert len(render(figure, "png")) > 5000
