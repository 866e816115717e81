"""Measurement: the gradients are those of the loss, the draws are as promised, and the memory changes nothing."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demerge.analysis.gradients import _draw, adam_scale, cost, measure, products
from demerge.analysis.similarity import cross, kernel, similarity
from demerge.conflict import Array
from demerge.data import load_images
from demerge.diffusion import Diffusion
from demerge.errors import NumericalError, ResourceError, UsageError

SMALL = {"bins": 3, "groups": 5, "batch_size": 2}


def truth(model: Any, data: Any, edges: list[int]) -> Array:
    """mu [N D] of f = theta x: the mean over t and images of 2/P [theta (a^2 x0^2 + s^2) - s]."""
    x0 = data.floats(range(len(data))).double().flatten(1)
    theta = model.denoiser.theta.detach().double().flatten()
    abar = model.alphas_cumprod
    s = (1 - abar).sqrt()[:, None, None]
    by_t = 2 / theta.numel() * (theta * (abar[:, None, None] * x0**2 + s**2) - s).mean(1)
    means = [by_t[a:b].mean(0) for a, b in pairwise(edges)]
    return np.asarray(torch.stack(means).numpy())


@pytest.mark.parametrize(
    "options", [{}, {"draws": "independent"}, {"antithetic": True}], ids=["shared", "independent", "antithetic"]
)
def test_a_linear_problem_is_measured_without_bias(linear: Any, images: Any, options: dict[str, Any]) -> None:
    maps = [measure(linear, images, **SMALL, **options, seed=seed) for seed in range(60)]
    mu = truth(linear, images, maps[0].edges)
    values = np.array([kernel(map, cross(5)) for map in maps])
    z = (values.mean(0) - mu @ mu.T) / (values.std(0, ddof=1) / len(maps) ** 0.5)
    assert abs(z).max() < 3.5


def test_antithetic_noise_takes_away_noise(linear: Any, images: Any) -> None:
    """Where x_t is nearly x0 the linear problem's noise is odd in eps."""

    def noise(antithetic: bool) -> float:
        map = measure(linear, images, bins=30, groups=40, batch_size=2, antithetic=antithetic)
        squares = np.einsum("imim->i", map.gram) / map.M
        return float(squares[0] - kernel(map, cross(map.M))[0, 0])

    assert noise(True) < 0.8 * noise(False)


def test_the_gram_is_that_of_plain_backward_passes(tiny: Path) -> None:
    model, data = Diffusion.load(tiny), load_images("digits", split="train", limit=20)
    seen: list[tuple[int, int, str]] = []
    map = measure(model, data, **SMALL, seed=3, progress=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(i, 15) for i in range(1, 16)]
    assert not any(p.requires_grad or p.grad is not None for p in model.denoiser.parameters())
    model.denoiser.requires_grad_(True)
    rows = []
    for i, span in enumerate(map.bins):
        for m in range(5):
            x0, condition, noise, position = _draw(model, data, m, 2, 3, False)
            t = torch.tensor([span.start + int(p * len(span)) for p in position])
            assert all(int(each) in span for each in t), i
            model.denoiser.zero_grad()
            model.loss(x0, noise, t, condition).mean().backward()
            rows.append(torch.cat([p.grad.flatten() for p in model.denoiser.parameters()]).double().numpy())
    flat = np.array(rows)
    assert np.allclose(map.gram.reshape(15, 15), flat @ flat.T, rtol=1e-4, atol=1e-6 * (flat**2).sum(1).max())
    assert map.origin.parameters == flat.shape[1]


def test_little_memory_takes_more_passes_to_the_same_map(tiny: Path) -> None:
    model, data = Diffusion.load(tiny), load_images("digits", limit=20)
    for metric in ("euclid", "adam"):
        whole = measure(model, data, **SMALL, metric=metric)
        memory = 4 * 15 * 20_000
        assert cost(model, bins=3, groups=5, memory=memory).parts > 1
        parts = measure(model, data, **SMALL, metric=metric, memory=memory)
        assert np.allclose(parts.gram, whole.gram, rtol=1e-4, atol=1e-6 * abs(whole.gram).max())


def test_the_cost_is_said_first(tiny: Path) -> None:
    model = Diffusion.load(tiny)
    D = sum(p.numel() for p in model.denoiser.parameters())
    whole = cost(model, bins=3, groups=5)
    assert (whole.passes, whole.parts, whole.bytes) == (15, 1, 4 * 15 * D) and "15 backward passes" in str(whole)
    with pytest.raises(ResourceError, match="parts"):
        cost(model, bins=3, groups=5, memory=1)


def test_maps_repeat_and_differ_by_seed(linear: Any, images: Any) -> None:
    first = measure(linear, images, **SMALL)
    assert np.array_equal(first.gram, measure(linear, images, **SMALL).gram)
    assert not np.array_equal(first.gram, measure(linear, images, **SMALL, seed=1).gram)


def test_draws_are_shared_between_bins_only_when_asked(linear: Any, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[int] = []

    def spy(*arguments: Any) -> Any:
        keys.append(arguments[2])
        return _draw(*arguments)

    monkeypatch.setattr("demerge.analysis.gradients._draw", spy)
    measure(linear, images, **SMALL)
    assert keys == [0, 1, 2, 3, 4]
    keys.clear()
    measure(linear, images, **SMALL, draws="independent")
    assert len(set(keys)) == len(keys) == 15 and not set(keys) & set(range(5))


def test_dropout_is_off(tiny: Path, linear: Any, images: Any) -> None:
    class Dropping(type(linear.denoiser)):  # type: ignore[misc]
        def forward(self, x: Any, t: Any) -> Any:
            return super().forward(torch.nn.functional.dropout(x, 0.5, self.training), t)

    dropping = linear.with_denoiser(Dropping(3).train())
    assert np.array_equal(measure(dropping, images, **SMALL).gram, measure(linear, images, **SMALL).gram)
    assert dropping.denoiser.training


def test_products_of_long_rows() -> None:
    rows = torch.randn(5, 70_001, generator=torch.Generator().manual_seed(0))
    assert np.allclose(products(rows), (rows.double() @ rows.double().T).numpy(), atol=1e-2, rtol=1e-6)


def test_the_adam_scale_by_hand() -> None:
    assert adam_scale(torch.tensor([[2.0, 0.0, 1.0], [2.0, 0.0, 7.0]])).tolist() == pytest.approx([2**-0.5, 1, 5**-0.5])


def test_adam_products_are_divided_by_the_root_of_v() -> None:
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 9)
    root_v = rows.double().square().mean(0).sqrt()
    expected = torch.einsum("ap,bp,p->ab", rows.double(), rows.double(), 1 / root_v)
    assert np.allclose(products(rows * adam_scale(rows)), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 4},
        {"batch_size": 0},
        {"memory": 0},
        {"draws": "some"},
        {"metric": "l1"},
        {"bins": 31},
        {"bins": 0},
        {"antithetic": True, "batch_size": 3},
    ],
)
def test_wrong_arguments_are_usage_errors(linear: Any, images: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        measure(linear, images, **{**SMALL, **wrong})


def test_a_gradient_that_is_not_finite_names_its_bin(linear: Any, images: Any) -> None:
    with torch.no_grad():
        linear.denoiser.theta[0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match="bin 0000-0010"):
        measure(linear, images, **SMALL)


def test_a_text_model_is_measured_with_its_captions(tiny_text: Path, image_folder: Path) -> None:
    model = Diffusion.load(tiny_text)
    data = load_images(image_folder, resolution=16, channels=3)
    map = measure(model, data, bins=2, groups=5, batch_size=1)
    assert map.gram.shape == (2, 5, 2, 5) and similarity(map).reliability.shape == (2,)
    with pytest.raises(UsageError, match="captions"):
        measure(model, load_images("digits", resolution=16, channels=3, limit=5), bins=2, groups=5, batch_size=1)
