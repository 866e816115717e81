"""The range Fisher: squared per example, equal by every engine, the bad sample named."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from demerge.data import ImageData, load_images
from demerge.diffusion.model import Diffusion
from demerge.errors import NumericalError, UsageError
from demerge.randomness import normal, permutation, uniform
from demerge.statistics import fisher as module
from demerge.statistics import range_fisher
from demerge.statistics.examples import Sampler
from demerge.timesteps import TimestepRange

SPAN = TimestepRange(200, 300)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_images("digits", split="train", limit=8)


def expected(model: Diffusion, data: ImageData, samples: int) -> dict[str, torch.Tensor]:
    """The slow oracle: one image, one loss, one backward pass at a time."""
    single = model.with_denoiser(copy.deepcopy(model.denoiser).requires_grad_(True))
    parameters = dict(single.denoiser.named_parameters())
    sums = {n: torch.zeros_like(p) for n, p in parameters.items()}
    order = permutation(len(data), 1, "stats image")
    for j in range(samples):
        x0, _ = model.encode(data.floats([order[j % len(data)]]))
        t = (200 + uniform(1, "stats timestep", samples=[j]) * 100).long()
        noise = normal(x0.shape[1:], 1, "stats noise", samples=[j])
        single.denoiser.zero_grad()
        single.loss(x0, noise, t).sum().backward()
        for n, p in parameters.items():
            sums[n] += p.grad.square() / samples if p.grad is not None else 0
    return sums


@pytest.mark.parametrize("engine", ["side by side", "one by one"])
def test_is_the_mean_of_squared_gradients_of_single_examples(
    tiny: Path, data: ImageData, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "one by one":
        monkeypatch.setattr(module, "GRADIENT_BYTES", 1)
    else:
        monkeypatch.setattr(module, "BATCH", 8)
    model = Diffusion.load(tiny)
    found = range_fisher(model, data, SPAN, samples=11, seed=1)
    assert str(found.facts["gradients"]).startswith(engine)
    means = expected(model, data, 11)
    assert set(found.tensors) == set(means)
    for n, mean in means.items():
        torch.testing.assert_close(found.tensors[n], mean, rtol=1e-4, atol=1e-9)
        assert bool((found.tensors[n] >= 0).all())


def test_both_engines_agree_on_a_model_that_takes_text(tiny_text: Path, image_folder: Path) -> None:
    model, captioned = (
        Diffusion.load(tiny_text),
        load_images(image_folder, resolution=16, channels=3),
    )
    _, examples = next(Sampler(model, captioned, SPAN, 3).batches(3))
    slow, fast = module.one_by_one(model)(examples), module.side_by_side(model)(examples)
    assert all(t.shape[0] == 3 for t in fast.values())
    for n, t in slow.items():
        torch.testing.assert_close(fast[n], t, rtol=1e-3, atol=1e-6)
    assert range_fisher(model, captioned, SPAN, samples=2).facts["gradients"] == "side by side"


def test_leaves_the_model_as_it_was(tiny: Path, data: ImageData) -> None:
    model = Diffusion.load(tiny)
    model.denoiser.train()
    before = model.sha256
    first = range_fisher(model, data, SPAN, samples=2)
    assert model.sha256 == before and not any(p.requires_grad for p in model.denoiser.parameters())
    assert all(part.training for part in model.denoiser.modules())
    second = range_fisher(model, data, SPAN, samples=2)
    assert all(torch.equal(second.tensors[n], t) for n, t in first.tensors.items())


class Gate(nn.Module):
    """Passes its input on by a look at its values, which vmap cannot."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.detach().sum()) != 0 else -x


class Chance(nn.Module):
    """Draws a random number, which vmap refuses to share between examples."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + torch.rand(()))


@pytest.mark.parametrize("part", [Gate, Chance])
def test_falls_back_by_name_where_vmap_cannot(
    tiny: Path, data: ImageData, part: type[nn.Module]
) -> None:
    model = Diffusion.load(tiny)
    model.denoiser.conv_in = nn.Sequential(model.denoiser.conv_in, part())
    found = range_fisher(model, data, SPAN, samples=2)
    assert "vmap fails" in str(found.facts["gradients"])
    assert found.facts["batch"] == 1


def test_gradients_that_disagree_are_not_used(
    tiny: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Diffusion.load(tiny)
    good = range_fisher(model, data, SPAN, samples=2).tensors
    wrong = module.side_by_side(model)
    monkeypatch.setattr(
        module, "side_by_side", lambda _: lambda e: {n: 1.001 * g for n, g in wrong(e).items()}
    )
    found = range_fisher(model, data, SPAN, samples=2)
    assert found.facts["gradients"] == "one by one: vmap gives other gradients"
    for n, tensor in good.items():
        torch.testing.assert_close(found.tensors[n], tensor, rtol=1e-4, atol=1e-9)


def test_buffers_and_tied_parameters_have_a_fisher(tiny: Path, data: ImageData) -> None:
    model = Diffusion.load(tiny)
    model.denoiser.register_buffer("count", torch.ones(3))
    model.denoiser.twin = model.denoiser.conv_in
    tensors = range_fisher(model, data, SPAN, samples=1).tensors
    assert torch.equal(tensors["count"], torch.zeros(3))
    assert torch.equal(tensors["twin.weight"], tensors["conv_in.weight"])
    assert bool((tensors["twin.weight"] > 0).any())


def test_a_gradient_that_is_not_finite_names_its_sample(tiny: Path, data: ImageData) -> None:
    class Broken(Diffusion):
        def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            x_t = super().add_noise(x0, noise, t)
            bad = (x0 - data.floats([order[3]])).abs().flatten(1).sum(1) == 0
            return torch.where(bad.view(-1, 1, 1, 1), torch.inf, x_t)

    order = permutation(len(data), 0, "stats image")
    stock = Diffusion.load(tiny)
    model = Broken(stock.denoiser, stock.scheduler)
    with pytest.raises(
        NumericalError, match=rf"sample 3 \(image {order[3]} of digits\) of range 0200-0300"
    ):
        range_fisher(model, data, SPAN, samples=8)


@pytest.mark.parametrize(("span", "samples"), [(TimestepRange(0, 1001), 1), (SPAN, 0)])
def test_refuses_what_cannot_be_drawn(
    tiny: Path, data: ImageData, span: TimestepRange, samples: int
) -> None:
    with pytest.raises(UsageError, match="cannot be drawn"):
        range_fisher(Diffusion.load(tiny), data, span, samples=samples)


def test_progress_counts_the_samples(tiny: Path, data: ImageData) -> None:
    seen: list[tuple[int, int]] = []
    range_fisher(Diffusion.load(tiny), data, SPAN, samples=40, progress=lambda *at: seen.append(at))
    assert seen == [(32, 40), (40, 40)]
