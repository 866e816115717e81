"""Sampling: exactly n images, image i a function of (seed, i), and routing by the value of t."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from demerge.diffusion.model import Diffusion
from demerge.diffusion.options import SampleOptions, SamplingOptions
from demerge.diffusion.sampling import make_scheduler, sample
from demerge.errors import NumericalError, UsageError
from demerge.options import parse_numbers
from demerge.randomness import normal


@pytest.fixture
def model(tiny: Path) -> Diffusion:
    return Diffusion.load(tiny)


def draw(model: Diffusion, n: int, **values: Any) -> Tensor:
    """Draw n images; what is an option goes into `SamplingOptions`."""
    fields = SamplingOptions.__dataclass_fields__
    options = {name: values.pop(name) for name in list(values) if name in fields}
    return sample(model, n, SamplingOptions(**options), **values)


@pytest.mark.parametrize("sampler", ["ddim", "base"])
def test_images_do_not_depend_on_batch_size_or_start(model: Diffusion, sampler: str) -> None:
    options = {"seed": 3, "steps": 4, "sampler": sampler}
    whole = draw(model, 7, batch_size=7, **options)
    assert whole.shape == (7, 1, 8, 8)
    assert whole.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in whole}) == 7
    for parts in (
        draw(model, 7, batch_size=3, **options),
        torch.cat([draw(model, 1, first=i, **options) for i in range(7)]),
    ):
        assert int((whole.int() - parts.int()).abs().max()) <= 1
    assert not torch.equal(whole, draw(model, 7, batch_size=7, **{**options, "seed": 4}))


def test_a_sampler_with_a_history_forgets_it_between_batches(model: Diffusion) -> None:
    pndm = replace(
        model,
        scheduler=diffusers.PNDMScheduler.from_config(model.scheduler.config, skip_prk_steps=True),
    )
    whole = draw(pndm, 5, seed=3, steps=6, sampler="base", batch_size=5)
    parts = draw(pndm, 5, seed=3, steps=6, sampler="base", batch_size=2)
    assert int((whole.int() - parts.int()).abs().max()) <= 1


@pytest.mark.parametrize("steps", [7, 999, 1000])
def test_an_offset_never_leads_beyond_the_schedule(model: Diffusion, steps: int) -> None:
    config = {**model.scheduler.config, "steps_offset": 1}
    shifted = replace(model, scheduler=diffusers.DDIMScheduler.from_config(config))
    assert max(make_scheduler(shifted, steps, "ddim").timesteps.tolist()) < 1000


@pytest.mark.parametrize("n", [1, 5, 8])
def test_exactly_n_images_and_progress_ends_at_n(model: Diffusion, n: int) -> None:
    seen: list[tuple[int, int]] = []
    assert (
        len(draw(model, n, seed=0, steps=2, batch_size=4, progress=lambda *done: seen.append(done)))
        == n
    )
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
    assert int((draw(model, 3, seed=5, steps=10).int() - expected).abs().max()) <= 1


def test_ddim_walks_back_by_the_spacing_it_assumes(model: Diffusion) -> None:
    for steps in (1, 3, 7, 50, 999, 1000):
        scheduler = make_scheduler(model, steps, "ddim")
        ts = scheduler.timesteps.tolist()
        assert len(ts) == steps
        assert all(a - b == 1000 // steps for a, b in pairwise(ts))


def test_text_to_image(tiny_text: Path) -> None:
    model = Diffusion.load(tiny_text)
    images = draw(model, 3, seed=0, steps=2, captions=["a cat", "a dog"])
    assert images.shape == (3, 3, 16, 16)
    with pytest.raises(UsageError, match="takes text"):
        draw(model, 1, seed=0, steps=2)


@pytest.mark.parametrize(
    ("name", "value"), [("num_images", 0), ("steps", 0), ("steps", 1001), ("batch_size", 0)]
)
def test_bad_number_is_named(model: Diffusion, name: str, value: int) -> None:
    values = {"num_images": 1, "steps": 2, name: value}
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        draw(model, values.pop("num_images"), **values)
    if value == 0:
        with pytest.raises(UsageError, match=f"{name} is 0"):
            SampleOptions(**{name: value})


def test_non_finite_image_is_an_error(model: Diffusion) -> None:
    with torch.no_grad():
        model.denoiser.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NumericalError, match="finite"):
        draw(model, 1, seed=0, steps=2)


def test_classes_of_a_dit_follow_one_another_or_are_given(tiny_dit: Path) -> None:
    model = Diffusion.load(tiny_dit)
    with torch.no_grad():  # a DiT starts as the identity, whatever the class
        g = torch.Generator().manual_seed(0)
        for parameter in model.denoiser.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.3)
    options = {"seed": 3, "steps": 3}
    images = draw(model, 12, **options)
    assert images.shape == (12, 3, 16, 16)
    assert torch.equal(images, draw(model, 12, labels=range(10), **options))
    assert torch.equal(images[10:], draw(model, 2, first=10, labels=list(range(10)), **options))
    other = draw(model, 12, labels=[10], **options)
    assert not torch.equal(images, other)
    for wrong in ([11], [-1], []):
        with pytest.raises(UsageError, match="label"):
            draw(model, 2, labels=wrong, **options)


def test_a_model_without_classes_takes_no_labels(model: Diffusion) -> None:
    with pytest.raises(UsageError, match="takes no classes"):
        draw(model, 1, seed=0, labels=[0])


def test_labels_are_read_as_numbers() -> None:
    assert parse_numbers("3, 3,7", "labels") == (3, 3, 7)
    for wrong in ("", "cat", "1,,2", "-1"):
        with pytest.raises(UsageError, match="are not numbers"):
            parse_numbers(wrong, "labels")


def test_a_learned_variance_is_refused_by_name(tiny_dit: Path) -> None:
    model = Diffusion.load(tiny_dit)
    learned = replace(model, scheduler=diffusers.DDPMScheduler(variance_type="learned_range"))
    with pytest.raises(UsageError, match="DDPMScheduler draws with a learned variance"):
        draw(learned, 1, seed=0, steps=2, sampler="base")
    assert len(draw(learned, 1, seed=0, steps=2)) == 1


# Every scheduler of diffusers with a DDPM-like schedule that a Stable Diffusion pipeline may state, and those of pixels.
SCHEDULERS = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "LMSDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "SASolverScheduler": {},
    "LCMScheduler": {},
    "TCDScheduler": {},
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _end(scheduler: object, x0: float) -> float:
    """Where a scheduler ends from noise, if the denoiser knows x_0 exactly."""
    scheduler.set_timesteps(20)
    abar = scheduler.alphas_cumprod.double()
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8) * float(
        scheduler.init_noise_sigma
    )
    given = (
        {"generator": torch.Generator().manual_seed(0)}
        if "generator" in inspect.signature(scheduler.step).parameters
        else {}
    )
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        low = min(int(t), 998)
        a = torch.lerp(abar[low], abar[low + 1], float(t) - low)
        epsilon = (scaled - a.sqrt() * x0) / (1 - a).sqrt()
        x = scheduler.step(epsilon, t, x, **given).prev_sample
    return float(x.double().mean())


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "stated", [{}, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}]
)
def test_ddim_clips_and_ends_as_the_bases_own_scheduler_does(
    model: Diffusion, name: str, stated: dict[str, object]
) -> None:
    kind = getattr(diffusers, name)
    own = kind.from_config({**SCHEDULE, **SCHEDULERS[name], **stated})
    ddim = make_scheduler(replace(model, scheduler=own), 20, "ddim")
    assert torch.equal(ddim.alphas_cumprod, own.alphas_cumprod)
    if stated:
        assert (
            ddim.config.clip_sample,
            ddim.config.set_alpha_to_one,
            ddim.config.steps_offset,
        ) == (False, False, 1)
        assert torch.equal(ddim.final_alpha_cumprod, own.alphas_cumprod[0])
        return
    clips = [_end(scheduler, 3.0) < 1.5 for scheduler in (ddim, own)]
    assert clips == [name in ("DDIMScheduler", "DDPMScheduler")] * 2
    if name != "TCDScheduler":  # its own last step goes to t = 0, not through the field
        ends_at_x0 = [
            abs(_end(scheduler, 0.5) - 0.5) < 1e-5 for scheduler in (ddim, own)
        ]  # or else at the noise of t = 0
        assert (
            ends_at_x0
            == [name not in ("PNDMScheduler", "DEISMultistepScheduler", "SASolverScheduler")] * 2
        )
    assert ddim.config.thresholding is False


def test_a_final_sigma_of_the_least_noise_is_kept(model: Diffusion) -> None:
    for name in (
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ):
        own = getattr(diffusers, name)(**SCHEDULE, final_sigmas_type="sigma_min")
        ddim = make_scheduler(replace(model, scheduler=own), 20, "ddim")
        assert torch.equal(ddim.final_alpha_cumprod, own.alphas_cumprod[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_text_pipeline_neither_clips_nor_starts_at_0(tiny_text: Path, name: str) -> None:
    """`StableDiffusionPipeline` sets clip_sample to False and steps_offset to 1, whatever its scheduler's file says."""
    model = Diffusion.load(tiny_text)
    own = getattr(diffusers, name).from_config({**SCHEDULE, **SCHEDULERS[name]})
    ddim, base = (
        make_scheduler(replace(model, scheduler=own), 20, sampler) for sampler in ("ddim", "base")
    )
    stock = diffusers.StableDiffusionPipeline(
        model.vae,
        model.text.encoder.model,
        model.text.encoder.tokenizer,
        model.denoiser,
        own,
        None,
        None,
        requires_safety_checker=False,
    ).scheduler
    stock.set_timesteps(20)
    assert torch.equal(torch.as_tensor(base.timesteps), torch.as_tensor(stock.timesteps))
    assert base.config.get("clip_sample", False) is stock.config.get("clip_sample", False) is False
    assert (ddim.config.clip_sample, ddim.config.steps_offset, min(ddim.timesteps.tolist())) == (
        False,
        1,
        1,
    )


def test_a_schedule_that_the_class_assumes_is_not_replaced_by_that_of_ddim(
    model: Diffusion,
) -> None:
    """LCM's own betas are scaled linear from 0.00085; those of DDIM are linear from 0.0001."""
    own = diffusers.LCMScheduler.from_config({})
    ddim = make_scheduler(replace(model, scheduler=own), 4, "ddim")
    assert torch.equal(ddim.alphas_cumprod, own.alphas_cumprod)
    assert not torch.equal(ddim.alphas_cumprod, diffusers.DDIMScheduler().alphas_cumprod)


def test_a_step_at_snr_zero_is_refused_for_epsilon_alone(model: Diffusion) -> None:
    zero = replace(model, scheduler=diffusers.DDPMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(UsageError, match="t = 999, where the SNR is 0"):
        draw(zero, 1, seed=0, steps=1000)
    assert len(draw(zero, 1, seed=0, steps=5)) == 1
    v = diffusers.DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert make_scheduler(replace(model, scheduler=v), 1000, "ddim").timesteps[0] == 999


# -- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.DDIMScheduler, diffusers.PNDMScheduler, diffusers.EulerDiscreteScheduler],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_guidance_is_that_of_the_stock_pipeline(
    tiny_text: Path, scheduler: type, guidance_scale: float
) -> None:
    """From equal noise, with its own scheduler; the stock pipeline sets a caption against the tokens of ""."""
    own = scheduler(
        **SCHEDULE, **({"skip_prk_steps": True} if scheduler is diffusers.PNDMScheduler else {})
    )
    model = replace(Diffusion.load(tiny_text), scheduler=own)
    captions = ["a cat", "two dogs"]
    stock = diffusers.StableDiffusionPipeline(
        model.vae,
        model.text.encoder.model,
        model.text.encoder.tokenizer,
        model.denoiser,
        own,
        None,
        None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    noise = normal(model.sample_shape, 3, "image", samples=range(2))
    expected = stock(
        captions,
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        latents=noise,
        output_type="pt",
    ).images
    images = draw(
        model, 2, seed=3, steps=5, sampler="base", captions=captions, guidance_scale=guidance_scale
    )
    assert int((images.int() - (expected * 255).round().int()).abs().max()) <= 1


def test_guidance_1_is_no_guidance_and_more_is_another_image(tiny_text: Path) -> None:
    model = Diffusion.load(tiny_text)
    options = {"seed": 0, "steps": 3, "captions": ["a cat"]}
    plain = draw(model, 2, **options)
    assert torch.equal(draw(model, 2, **options, guidance_scale=1.0), plain)
    assert not torch.equal(draw(model, 2, **options, guidance_scale=20.0), plain)
    assert torch.equal(
        draw(model, 2, seed=0, steps=3, captions=[""]),
        draw(model, 2, seed=0, steps=3, captions=[""], guidance_scale=5),
    )


def test_guidance_of_a_dit_is_against_no_class(tiny_dit: Path) -> None:
    model = Diffusion.load(tiny_dit)
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        for parameter in model.denoiser.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.3)
    scheduler = make_scheduler(model, 2, "ddim")
    x = normal(model.sample_shape, 1, "image", samples=range(2))
    with torch.no_grad():
        for t in scheduler.timesteps:
            null, given = (
                model.predict(x, t, {"class_labels": torch.tensor(labels)})
                for labels in ([10, 10], [3, 7])
            )
            x = scheduler.step(null + 4 * (given - null), t, x).prev_sample
        expected = ((model.decode(x).clamp(-1, 1) + 1) * 127.5).round().int()
    images = draw(model, 2, seed=1, steps=2, labels=[3, 7], guidance_scale=4)
    assert int((images.int() - expected).abs().max()) <= 1
    assert torch.equal(
        draw(model, 1, seed=1, steps=2, labels=[10]),
        draw(model, 1, seed=1, steps=2, labels=[10], guidance_scale=4),
    )


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (0.5, "guidance_scale is 0.5"),
        (math.inf, "is inf"),
        (math.nan, "is nan"),
        (2, "takes no condition"),
    ],
)
def test_guidance_that_cannot_be_is_refused(model: Diffusion, scale: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw(model, 1, seed=0, steps=2, guidance_scale=scale)
