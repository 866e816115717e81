"""Losses around a base: known parabolas, points at their places, the model untouched, equal numbers for equal arguments."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from demerge.analysis.experts.landscape import Landscape, loss_path, loss_plane
from demerge.analysis.experts.plots import (
    loss_along_path,
    loss_on_plane,
    norms_by_block,
    norms_by_layer,
)
from demerge.analysis.experts.task_vectors import task_vectors
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
def plane(linear: Any, images: Any) -> Landscape:
    first, second = moved(linear, 0.1, slice(0, 4)), moved(linear, -0.2, slice(4, 9))
    return loss_plane(linear, first, second, images, TWO, steps=[-0.5, 0.0, 0.5, 1.0], **SIZE)


def test_a_linear_model_has_parabolas_for_paths(linear: Any, images: Any) -> None:
    path = loss_path(linear, moved(linear, 0.3, slice(0, 9)), images, TWO, **SIZE)
    table = path.table()
    assert list(table.columns) == ["s", "range", "loss", "change", "se"] and len(table) == 7 * 2
    for name in path.ranges:
        rows = table[table.range == name]
        square = np.polynomial.Polynomial.fit(rows.s, rows.loss, 2)
        assert rows.loss.to_numpy() == pytest.approx(square(rows.s.to_numpy()), rel=1e-5)
        assert rows.change.iloc[0] == rows.se.iloc[0] == 0 and (rows.se.iloc[1:] > 0).all()
        assert rows.change.to_numpy() == pytest.approx(rows.loss.to_numpy() / rows.loss.iloc[0] - 1)


def test_the_ends_of_a_path_are_the_two_models(linear: Any, images: Any) -> None:
    merged = moved(linear, 0.3, slice(2, 7))
    path = loss_path(linear, merged, images, TWO, scales=[1.0, 0.0], **SIZE)
    assert path.losses[1] == path.base == range_losses(linear, images, TWO, **SIZE)
    other = linear.with_denoiser(type(linear.denoiser)(3))
    other.denoiser.load_state_dict(merged)
    assert path.losses[0] == range_losses(other, images, TWO, **SIZE)
    assert path == loss_path(linear, other, images, TWO, scales=[1.0, 0.0], **SIZE)


def test_a_plane_holds_base_and_experts_at_their_places(
    linear: Any, images: Any, plane: Landscape
) -> None:
    assert len(plane.points) == 16 and plane.axes == ("w_i", "w_j")
    at = dict(zip(plane.points, plane.losses, strict=True))
    assert at[0.0, 0.0] == plane.base
    for place, expert in (
        ((1.0, 0.0), moved(linear, 0.1, slice(0, 4))),
        ((0.0, 1.0), moved(linear, -0.2, slice(4, 9))),
    ):
        path = loss_path(linear, expert, images, TWO, scales=[1.0], **SIZE)
        assert at[place].means == pytest.approx(path.losses[0].means)
    x, y, change = plane.grid("change", plane.ranges[1])
    assert x.tolist() == y.tolist() == [-0.5, 0.0, 0.5, 1.0] and change.shape == (4, 4)
    assert change[1, 3] == at[1.0, 0.0].change(plane.base)[plane.ranges[1]][0]


def test_disjoint_task_vectors_add_up_on_their_plane(plane: Landscape) -> None:
    """The loss of f = theta x is a sum over pixels, so that experts of other pixels have no mixed term."""
    for name in plane.ranges:
        loss = plane.grid("loss", name)[2]
        assert loss - loss[1] - loss[:, 1:2] + loss[1, 1] == pytest.approx(0, abs=1e-6 * loss.max())


def test_the_model_stays_as_it_is(
    linear: Any, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, module = linear.denoiser.theta.detach().clone(), linear.denoiser.train()
    loss_path(linear, moved(linear, 1.0, slice(0, 9)), images, TWO, **SIZE)
    assert (
        torch.equal(linear.denoiser.theta, before) and linear.denoiser is module and module.training
    )

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("demerge.analysis.experts.landscape.range_losses", fail)
    with pytest.raises(RuntimeError):
        loss_path(linear, moved(linear, 1.0, slice(0, 9)), images, TWO, **SIZE)
    assert torch.equal(linear.denoiser.theta, before) and linear.denoiser.theta.requires_grad


def test_equal_arguments_give_equal_numbers_and_progress_is_told(linear: Any, images: Any) -> None:
    seen: list[tuple[int, int, str]] = []
    expert = moved(linear, 0.2, slice(0, 5))
    arguments = (linear, expert, images, TWO)
    first = loss_path(
        *arguments, scales=[0.5, 1.0], **SIZE, progress=lambda *step: seen.append(step)
    )
    assert seen == [(1, 3, "s = 0"), (2, 3, "s = 0.5"), (3, 3, "s = 1")]
    assert first == loss_path(*arguments, scales=[0.5, 1.0], **SIZE)
    assert first != loss_path(*arguments, scales=[0.5, 1.0], samples=32, seed=6)


def test_what_does_not_fit_is_refused(linear: Any, images: Any, plane: Landscape) -> None:
    expert = moved(linear, 0.2, slice(0, 5))
    for wrong in (
        {"scales": []},
        {"scales": [1.0, 1.0]},
        {"scales": [np.inf]},
        {"batch_size": 0},
        {"samples": 3},
    ):
        with pytest.raises(UsageError):
            loss_path(linear, expert, images, TWO, **wrong)
    with pytest.raises(InputError, match="theta"):
        loss_path(linear, {"phi": expert["theta"]}, images, TWO, **SIZE)
    with pytest.raises(UsageError, match="do not fit"):
        Landscape(("s",), plane.points, plane.losses, plane.base)
    for column, span in (("norm", plane.ranges[0]), ("loss", "0000-0001")):
        with pytest.raises(UsageError):
            plane.grid(column, span)


# -- plots ---------------------------------------------------------------------------------------------------------------


def test_figures_render_without_warnings_and_repeat(
    linear: Any, images: Any, plane: Landscape
) -> None:
    path = loss_path(linear, moved(linear, 0.3, slice(0, 9)), images, TWO, **SIZE)
    flat = loss_plane(
        linear, *[moved(linear, 0.0, slice(0, 1))] * 2, images, TWO, steps=[0.0], **SIZE
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for draw in (
            lambda: loss_along_path(path, "ties"),
            lambda: loss_on_plane(plane),
            lambda: loss_on_plane(flat, "xy"),
        ):
            assert render(draw()) == render(draw()) and len(render(draw(), "png")) > 5000
    assert len(loss_on_plane(plane).axes) == len(plane.ranges) + 1


def test_the_wrong_landscape_or_labels_are_refused(
    linear: Any, images: Any, plane: Landscape
) -> None:
    path = loss_path(linear, moved(linear, 0.3, slice(0, 9)), images, TWO, **SIZE)
    for wrong in (
        lambda: loss_along_path(plane),
        lambda: loss_on_plane(path),
        lambda: loss_on_plane(plane, ["one"]),
    ):
        with pytest.raises(UsageError):
            wrong()


def test_norms_by_block_are_drawn() -> None:
    base = {
        "conv_in.weight": torch.zeros(4),
        "mid_block.a": torch.zeros(3),
        "mid_block.b": torch.zeros(2),
    }
    vectors = task_vectors(base, [{n: t + k for n, t in base.items()} for k in (0.0, 1.0, -2.0)])
    figure = norms_by_block(vectors, "xyz")
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
        vectors = task_vectors(base, [{n: t + k for n, t in base.items()} for k in steps])
        figure = norms_by_layer(vectors, "xyz")
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["in", "mid"]
        assert (
            figure.axes[0].get_ylabel() == "3 layers, by block"
            and len(render(figure, "png")) > 5000
        )
    with pytest.raises(UsageError, match="1 labels for 3"):
        norms_by_layer(vectors, ["x"])
