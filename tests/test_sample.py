"""Sampling: exactly n images, image i a function of (seed, i), and routing by the value of t."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch

from demerge.diffusion import Diffusion
from demerge.errors import InputError, NumericalError, UsageError
from demerge.sample import labels_of, load_routed, make_scheduler, routed, sample
from demerge.timesteps import Partition


@pytest.fixture
def model(tiny: Path) -> Diffusion:
    return Diffusion.load(tiny)


@pytest.mark.parametrize("sampler", ["ddim", "base"])
def test_images_do_not_depend_on_batch_size_or_start(model: Diffusion, sampler: str) -> None:
    options = {"seed": 3, "steps": 4, "sampler": sampler}
    whole = sample(model, 7, batch_size=7, **options)
    assert whole.shape == (7, 1, 8, 8)
    assert whole.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in whole}) == 7
    for parts in (
        sample(model, 7, batch_size=3, **options),
        torch.cat([sample(model, 1, first=i, **options) for i in range(7)]),
    ):
        assert int((whole.int() - parts.int()).abs().max()) <= 1
    assert not torch.equal(whole, sample(model, 7, batch_size=7, **{**options, "seed": 4}))


def test_a_sampler_with_a_history_forgets_it_between_batches(model: Diffusion) -> None:
    pndm = replace(model, scheduler=diffusers.PNDMScheduler.from_config(model.scheduler.config, skip_prk_steps=True))
    whole = sample(pndm, 5, seed=3, steps=6, sampler="base", batch_size=5)
    parts = sample(pndm, 5, seed=3, steps=6, sampler="base", batch_size=2)
    assert int((whole.int() - parts.int()).abs().max()) <= 1


@pytest.mark.parametrize("steps", [7, 999, 1000])
def test_an_offset_never_leads_beyond_the_schedule(model: Diffusion, steps: int) -> None:
    config = {**model.scheduler.config, "steps_offset": 1}
    shifted = replace(model, scheduler=diffusers.DDIMScheduler.from_config(config))
    assert max(make_scheduler(shifted, steps, "ddim").timesteps.tolist()) < 1000


@pytest.mark.parametrize("n", [1, 5, 8])
def test_exactly_n_images_and_progress_ends_at_n(model: Diffusion, n: int) -> None:
    seen: list[tuple[int, int]] = []
    assert len(sample(model, n, seed=0, steps=2, batch_size=4, progress=lambda *done: seen.append(done))) == n
    assert seen[-1] == (n, n)


def test_ddim_equals_diffusers_pipeline(model: Diffusion, tiny: Path) -> None:
    """The same starting noise through stock DDIMPipeline gives the same images."""
    from demerge.randomness import normal

    pipeline = diffusers.DDIMPipeline(model.denoiser, make_scheduler(model, 10, "ddim"))
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(10)
    x = normal((1, 8, 8), 5, "image", samples=range(3))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model.denoiser(x, t).sample, t, x, eta=0.0).prev_sample
    expected = ((x / 2 + 0.5).clamp(0, 1) * 255).round().int()
    assert int((sample(model, 3, seed=5, steps=10).int() - expected).abs().max()) <= 1


def test_ddim_walks_back_by_the_spacing_it_assumes(model: Diffusion) -> None:
    for steps in (1, 3, 7, 50, 999, 1000):
        scheduler = make_scheduler(model, steps, "ddim")
        ts = scheduler.timesteps.tolist()
        assert len(ts) == steps
        assert all(a - b == 1000 // steps for a, b in pairwise(ts))


def test_routing_is_right_for_every_number_of_steps(model: Diffusion) -> None:
    partition = Partition.from_cuts(1000, [100, 450, 451])
    for steps in [*range(1, 60), 123, 250, 500, 999, 1000]:
        for t in make_scheduler(model, steps, "ddim").timesteps.tolist():
            assert t in partition[partition.route(t)]


def test_each_sample_goes_to_the_expert_of_its_timestep(model: Diffusion) -> None:
    experts = [copy.deepcopy(model.denoiser) for _ in range(2)]
    with torch.no_grad():
        experts[1].conv_out.bias.add_(1.0)
        ensemble = routed(model, Partition.from_cuts(1000, [500]), experts)
        x, t = torch.randn(4, 1, 8, 8), torch.tensor([499, 500, 0, 999])
        difference = ensemble.predict(x, t) - model.predict(x, t)
    assert [round(float(d.mean()), 4) for d in difference] == [0.0, 1.0, 0.0, 1.0]


def test_ensemble_of_copies_is_the_base(model: Diffusion) -> None:
    ensemble = routed(model, Partition.uniform(1000, 2), [model.denoiser, copy.deepcopy(model.denoiser)])
    assert torch.equal(sample(ensemble, 3, seed=1, steps=5), sample(model, 3, seed=1, steps=5))


def test_experts_load_from_their_folder(tiny: Path, tmp_path: Path, add_expert: Callable[..., Path]) -> None:
    for start, stop in ((500, 1000), (0, 500)):
        add_expert(tmp_path / f"{start:04d}-{stop:04d}", start, stop)
    ensemble = load_routed(tiny, tmp_path)
    assert str(ensemble.denoiser.partition) == "0000-0500 0500-1000"
    with pytest.raises(InputError, match=r"no expert\.json"):
        load_routed(tiny, tmp_path / "nothing")
    (tmp_path / "0000-0500" / "expert.json").write_text("{}")
    with pytest.raises(InputError, match="no range of timesteps"):
        load_routed(tiny, tmp_path)


def test_text_to_image(tiny_text: Path) -> None:
    model = Diffusion.load(tiny_text)
    images = sample(model, 3, seed=0, steps=2, captions=["a cat", "a dog"])
    assert images.shape == (3, 3, 16, 16)
    with pytest.raises(UsageError, match="takes text"):
        sample(model, 1, seed=0, steps=2)


@pytest.mark.parametrize(("name", "value"), [("n", 0), ("steps", 0), ("steps", 1001), ("batch_size", 0)])
def test_bad_number_is_named(model: Diffusion, name: str, value: int) -> None:
    arguments = {"n": 1, "seed": 0, "steps": 2, "batch_size": 1, name: value}
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        sample(model, **arguments)


def test_non_finite_image_is_an_error(model: Diffusion) -> None:
    with torch.no_grad():
        model.denoiser.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NumericalError, match="finite"):
        sample(model, 1, seed=0, steps=2)


def test_classes_of_a_dit_follow_one_another_or_are_given(tiny_dit: Path) -> None:
    model = Diffusion.load(tiny_dit)
    with torch.no_grad():  # a DiT starts as the identity, whatever the class
        g = torch.Generator().manual_seed(0)
        for parameter in model.denoiser.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.3)
    options = {"seed": 3, "steps": 3}
    images = sample(model, 12, **options)
    assert images.shape == (12, 3, 16, 16)
    assert torch.equal(images, sample(model, 12, labels=range(10), **options))
    assert torch.equal(images[10:], sample(model, 2, first=10, labels=list(range(10)), **options))
    other = sample(model, 12, labels=[10], **options)
    assert not torch.equal(images, other)
    for wrong in ([11], [-1], []):
        with pytest.raises(UsageError, match="label"):
            sample(model, 2, labels=wrong, **options)


def test_a_model_without_classes_takes_no_labels(model: Diffusion) -> None:
    with pytest.raises(UsageError, match="takes no classes"):
        sample(model, 1, seed=0, labels=[0])


def test_labels_are_read_as_numbers() -> None:
    assert labels_of("3, 3,7") == [3, 3, 7]
    for wrong in ("", "cat", "1,,2", "-1"):
        with pytest.raises(UsageError, match="no numbers of classes"):
            labels_of(wrong)


def test_a_learned_variance_is_refused_by_name(tiny_dit: Path) -> None:
    model = Diffusion.load(tiny_dit)
    learned = replace(model, scheduler=diffusers.DDPMScheduler(variance_type="learned_range"))
    with pytest.raises(UsageError, match="DDPMScheduler draws with a learned variance"):
        sample(learned, 1, seed=0, steps=2, sampler="base")
    assert len(sample(learned, 1, seed=0, steps=2)) == 1


def test_experts_of_a_dit_are_routed(tiny_dit: Path) -> None:
    model = Diffusion.load(tiny_dit)
    ensemble = routed(model, Partition.from_cuts(1000, [500]), [model.denoiser, copy.deepcopy(model.denoiser)])
    images = sample(ensemble, 3, seed=0, steps=2)
    assert int((images.int() - sample(model, 3, seed=0, steps=2).int()).abs().max()) <= 1
