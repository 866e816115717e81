"""The range Fisher: squared per example, on the range alone, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demerge.data import ImageData, load_images
from demerge.diffusion import Diffusion
from demerge.errors import UsageError
from demerge.fisher import range_fisher, save_fisher
from demerge.randomness import normal, permutation, uniform
from demerge.timesteps import TimestepRange
from demerge.weights import Checkpoint

SPAN = TimestepRange(200, 300)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_images("digits", split="train", limit=8)


def test_is_the_mean_of_squared_gradients_of_single_examples(tiny: Path, data: ImageData) -> None:
    model = Diffusion.load(tiny)
    fisher = range_fisher(model, data, SPAN, samples=3, seed=1)
    model.denoiser.requires_grad_(True)
    parameters = dict(model.denoiser.named_parameters())
    expected = {n: torch.zeros_like(p) for n, p in parameters.items()}
    order = permutation(len(data), 1, "fisher order")
    for j in range(3):
        x0 = data.floats([order[j]])
        t = (200 + uniform(1, "fisher timestep", samples=[j]) * 100).long()
        noise = normal(x0.shape[1:], 1, "fisher noise", samples=[j])
        model.denoiser.zero_grad()
        model.loss(x0, noise, t).mean().backward()
        for n, p in parameters.items():
            expected[n] += p.grad.square() / 3 if p.grad is not None else 0
    assert set(fisher) == set(parameters)
    for n, mean in expected.items():
        torch.testing.assert_close(fisher[n], mean, rtol=1e-4, atol=1e-9)
        assert bool((fisher[n] >= 0).all())


def test_leaves_the_model_as_it_was(tiny: Path, data: ImageData) -> None:
    model = Diffusion.load(tiny)
    before = model.sha256
    first = range_fisher(model, data, SPAN, samples=2)
    assert model.sha256 == before and not any(p.requires_grad for p in model.denoiser.parameters())
    assert all(torch.equal(first[n], t) for n, t in range_fisher(model, data, SPAN, samples=2).items())


def test_is_saved_as_merge_reads_it(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    fisher = range_fisher(Diffusion.load(tiny), data, SPAN, samples=1)
    read = Checkpoint.open(save_fisher(fisher, tmp_path / "fisher.safetensors"))
    assert set(read) == set(Checkpoint.open(tiny))


@pytest.mark.parametrize(("span", "samples"), [(TimestepRange(0, 1001), 1), (SPAN, 0)])
def test_refuses_what_cannot_be_drawn(tiny: Path, data: ImageData, span: TimestepRange, samples: int) -> None:
    with pytest.raises(UsageError, match="cannot be drawn"):
        range_fisher(Diffusion.load(tiny), data, span, samples=samples)
