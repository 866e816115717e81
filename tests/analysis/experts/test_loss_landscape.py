"""Losses around a base: known parabolas, points at their places, equal numbers again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from demerge.analysis.experts.loss_landscape import Landscape, Probe, measure_landscape
from demerge.analysis.experts.plots import (
    draw_norms_by_block,
    draw_norms_by_layer,
    draw_path,
    draw_plane,
)
from demerge.analysis.experts.task_vectors import compare_task_vectors
from demerge.errors import InputError, UsageError
from demerge.evaluation.metrics.range_losses import range_losses
from demerge.reporting.theme import render
from demerge.timesteps import Partition

TWO = Partition.uniform(30, 2)
SIZE: dict[str, Any] = {"samples": 32, "seed": 5}


def moved(model: Any, step: float, part: slice) -> dict[str, torch.Tensor]:
    """The state of an expert: theta + step on some of the pixels."""
    theta = model.denoiser.theta.detach().clone()
    theta.flatten()[part] += step
    return {"theta": theta}


@pytest.fixture
def probe(linear: Any, images: Any) -> Probe:
    return Probe(model=linear, data=images, ranges=TWO, **SIZE)


def measure_path(
    probe: Probe, end: Any, scales: Sequence[float] = (0.0, 0.5, 1.0, 1.5), *progress: Any
) -> Landscape:
    return measure_landscape(probe, [end], [(s,) for s in scales], *progress)


def measure_plane(probe: Probe, ends: Sequence[Any], steps: Sequence[float]) -> Landscape:
    return measure_landscape(probe, ends, [(i, j) for j in steps for i in steps])


@pytest.fixture
def plane(linear: Any, probe: Probe) -> Landscape:
    first, second = moved(linear, 0.1, slice(0, 4)), moved(linear, -0.2, slice(4, 9))
    return measure_plane(probe, [first, second], [-0.5, 0.0, 0.5, 1.0])


def test_a_linear_model_has_parabolas_for_paths(linear: Any, probe: Probe) -> None:
    path = measure_path(probe, moved(linear, 0.3, slice(0, 9)))
    table = path.table()
    assert list(table.columns) == ["s", "range", "loss", "change", "se"] and len(table) == 4 * 2
    for name in path.ranges:
        rows = table[table.range == name]
        square = np.polynomial.Polynomial.fit(rows.s, rows.loss, 2)
        assert rows.loss.to_numpy() == pytest.approx(square(rows.s.to_numpy()), rel=1e-5)
        assert rows.change.iloc[0] == rows.se.iloc[0] == 0 and (rows.se.iloc[1:] > 0).all()
        assert rows.change.to_numpy() == pytest.approx(rows.loss.to_numpy() / rows.loss.iloc[0] - 1)


def test_the_ends_of_a_path_are_the_two_models(linear: Any, images: Any, probe: Probe) -> None:
    merged = moved(linear, 0.3, slice(2, 7))
    path = measure_path(probe, merged, [1.0, 0.0])
    assert path.losses[1] == path.base == range_losses(linear, images, TWO, **SIZE)
    other = linear.with_denoiser(type(linear.denoiser)(3))
    other.denoiser.load_state_dict(merged)
    assert path.losses[0] == range_losses(other, images, TWO, **SIZE)
    assert path == measure_path(probe, other, [1.0, 0.0])


def test_a_plane_holds_base_and_experts_at_their_places(
    linear: Any, probe: Probe, plane: Landscape
) -> None:
    assert len(plane.points) == 16 and plane.axes == ("w_i", "w_j")
    at = dict(zip(plane.points, plane.losses, strict=True))
    assert at[0.0, 0.0] == plane.base
    for place, expert in (
        ((1.0, 0.0), moved(linear, 0.1, slice(0, 4))),
        ((0.0, 1.0), moved(linear, -0.2, slice(4, 9))),
    ):
        path = measure_path(probe, expert, [1.0])
        assert at[place].means == pytest.approx(path.losses[0].means)
    x, y, change = plane.grid("change", plane.ranges[1])
    assert x.tolist() == y.tolist() == [-0.5, 0.0, 0.5, 1.0] and change.shape == (4, 4)
    assert change[1, 3] == at[1.0, 0.0].change(plane.base)[plane.ranges[1]].value


def test_disjoint_task_vectors_add_up_on_their_plane(plane: Landscape) -> None:
    """The loss of f = theta x is a sum over pixels: experts of other pixels do not mix."""
    for name in plane.ranges:
        loss = plane.grid("loss", name)[2]
        assert loss - loss[1] - loss[:, 1:2] + loss[1, 1] == pytest.approx(0, abs=1e-6 * loss.max())


def test_the_model_stays_as_it_is(
    linear: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, module = linear.denoiser.theta.detach().clone(), linear.denoiser.train()
    measure_path(probe, moved(linear, 1.0, slice(0, 9)))
    assert (
        torch.equal(linear.denoiser.theta, before) and linear.denoiser is module and module.training
    )

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("demerge.analysis.experts.loss_landscape.range_losses", fail)
    with pytest.raises(RuntimeError):
        measure_path(probe, moved(linear, 1.0, slice(0, 9)))
    assert torch.equal(linear.denoiser.theta, before) and linear.denoiser.theta.requires_grad


def test_equal_arguments_give_equal_numbers_and_progress_is_told(linear: Any, probe: Probe) -> None:
    seen: list[tuple[int, int, str]] = []
    expert = moved(linear, 0.2, slice(0, 5))
    first = measure_path(probe, expert, [0.5, 1.0], lambda *step: seen.append(step))
    assert seen == [(1, 3, "s = 0"), (2, 3, "s = 0.5"), (3, 3, "s = 1")]
    assert first == measure_path(probe, expert, [0.5, 1.0])
    assert first != measure_path(replace(probe, seed=6), expert, [0.5, 1.0])


def test_what_does_not_fit_is_refused(linear: Any, probe: Probe) -> None:
    expert = moved(linear, 0.2, slice(0, 5))
    with pytest.raises(UsageError):
        measure_path(replace(probe, samples=3), expert, [1.0])
    with pytest.raises(InputError, match="theta"):
        measure_path(probe, {"phi": expert["theta"]})


# -- plots ---------------------------------------------------------------------------------------


def test_figures_render_without_warnings_and_repeat(
    linear: Any, probe: Probe, plane: Landscape
) -> None:
    path = measure_path(probe, moved(linear, 0.3, slice(0, 9)))
    flat = measure_plane(probe, [moved(linear, 0.0, slice(0, 1))] * 2, [0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(render(draw_path(path, "ties"), "png")) > 5000
        assert len(render(draw_plane(flat, "xy"), "png")) > 5000
        figure = draw_plane(plane)
        assert len(render(figure, "png")) > 5000
        assert render(draw_path(path)) == render(draw_path(path))
    assert len(figure.axes) == len(plane.ranges) + 1


def test_norms_by_block_are_drawn() -> None:
    base = {
        "conv_in.weight": torch.zeros(4),
        "mid_block.a": torch.zeros(3),
        "mid_block.b": torch.zeros(2),
    }
    vectors = compare_task_vectors(
        base, [{n: t + k for n, t in base.items()} for k in (0.0, 1.0, -2.0)]
    )
    figure = draw_norms_by_block(vectors, "xyz")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["in", "mid"] and len(
        render(figure, "png")
    ) > 5000


def test_norms_by_layer_are_drawn_by_block() -> None:
    base = {
        "conv_in.weight": torch.zeros(4),
        "mid_block.a.weight": torch.zeros(3),
        "mid_block.b.weight": torch.zeros(2),
    }
    for steps in ((0.0, 1.0, -2.0), (0.0, 0.0, 0.0)):
        vectors = compare_task_vectors(base, [{n: t + k for n, t in base.items()} for k in steps])
        figure = draw_norms_by_layer(vectors, "xyz")
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["in", "mid"]
        assert (
            figure.axes[0].get_ylabel() == "3 layers, by block"
            and len(render(figure, "png")) > 5000
        )
