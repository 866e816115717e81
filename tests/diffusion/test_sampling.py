"""Sampling: exactly n images, image i a function of (seed, i), and routing by the value of t."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch

from demerge.diffusion import drawing
from demerge.diffusion.drawing import sample_to
from demerge.diffusion.model import Diffusion
from demerge.diffusion.sampling import (
    captions_of,
    labels_of,
    load_routed,
    make_scheduler,
    routed,
    sample,
)
from demerge.errors import InputError, NumericalError, UsageError
from demerge.randomness import normal
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
    pndm = replace(
        model,
        scheduler=diffusers.PNDMScheduler.from_config(model.scheduler.config, skip_prk_steps=True),
    )
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
    assert (
        len(
            sample(
                model, n, seed=0, steps=2, batch_size=4, progress=lambda *done: seen.append(done)
            )
        )
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
    ensemble = routed(
        model, Partition.uniform(1000, 2), [model.denoiser, copy.deepcopy(model.denoiser)]
    )
    assert torch.equal(sample(ensemble, 3, seed=1, steps=5), sample(model, 3, seed=1, steps=5))


def test_experts_load_from_their_folder(
    tiny: Path, tmp_path: Path, add_expert: Callable[..., Path]
) -> None:
    for start, stop in ((500, 1000), (0, 500)):
        add_expert(tmp_path / f"{start:04d}-{stop:04d}", start, stop)
    ensemble = load_routed(tiny, tmp_path)
    assert str(ensemble.denoiser.partition) == "0000-0500 0500-1000"
    with pytest.raises(InputError, match=r"no expert\.json"):
        load_routed(tiny, tmp_path / "nothing")
    (tmp_path / "0000-0500" / "expert.json").write_text("{}")
    with pytest.raises(InputError, match="the key 'range' is missing"):
        load_routed(tiny, tmp_path)


def test_text_to_image(tiny_text: Path) -> None:
    model = Diffusion.load(tiny_text)
    images = sample(model, 3, seed=0, steps=2, captions=["a cat", "a dog"])
    assert images.shape == (3, 3, 16, 16)
    with pytest.raises(UsageError, match="takes text"):
        sample(model, 1, seed=0, steps=2)


@pytest.mark.parametrize(
    ("name", "value"), [("n", 0), ("steps", 0), ("steps", 1001), ("batch_size", 0)]
)
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
    ensemble = routed(
        model, Partition.from_cuts(1000, [500]), [model.denoiser, copy.deepcopy(model.denoiser)]
    )
    images = sample(ensemble, 3, seed=0, steps=2)
    assert int((images.int() - sample(model, 3, seed=0, steps=2).int()).abs().max()) <= 1


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
        model.text.model,
        model.text.tokenizer,
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
        sample(zero, 1, seed=0, steps=1000)
    assert len(sample(zero, 1, seed=0, steps=5)) == 1
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
        model.text.model,
        model.text.tokenizer,
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
    images = sample(
        model, 2, seed=3, steps=5, sampler="base", captions=captions, guidance_scale=guidance_scale
    )
    assert int((images.int() - (expected * 255).round().int()).abs().max()) <= 1


def test_guidance_1_is_no_guidance_and_more_is_another_image(tiny_text: Path) -> None:
    model = Diffusion.load(tiny_text)
    options = {"seed": 0, "steps": 3, "captions": ["a cat"]}
    plain = sample(model, 2, **options)
    assert torch.equal(sample(model, 2, **options, guidance_scale=1.0), plain)
    assert not torch.equal(sample(model, 2, **options, guidance_scale=20.0), plain)
    assert torch.equal(
        sample(model, 2, seed=0, steps=3, captions=[""]),
        sample(model, 2, seed=0, steps=3, captions=[""], guidance_scale=5),
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
                model.predict(x, t, torch.tensor(labels)) for labels in ([10, 10], [3, 7])
            )
            x = scheduler.step(null + 4 * (given - null), t, x).prev_sample
        expected = ((model.decode(x).clamp(-1, 1) + 1) * 127.5).round().int()
    images = sample(model, 2, seed=1, steps=2, labels=[3, 7], guidance_scale=4)
    assert int((images.int() - expected).abs().max()) <= 1
    assert torch.equal(
        sample(model, 1, seed=1, steps=2, labels=[10]),
        sample(model, 1, seed=1, steps=2, labels=[10], guidance_scale=4),
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
        sample(model, 1, seed=0, steps=2, guidance_scale=scale)


# -- images in a folder -----------------------------------------------------------------------------------------------

OPTIONS = {"seed": 3, "steps": 2, "batch_size": 3}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("after", [0, 1, 4, 6])
def test_an_interrupted_folder_keeps_its_images_and_ends_in_the_same_bytes(
    model: Diffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    assert sample_to(tmp_path / "whole", model, 7, **OPTIONS) == 7
    written = 0
    commit = drawing.commit_file

    def killed(path: Path, write: object) -> Path:
        nonlocal written
        if written == after:
            raise KeyboardInterrupt
        written += 1
        return commit(path, write)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(drawing, "commit_file", killed)
        sample_to(tmp_path / "cut", model, 7, **OPTIONS)
    kept = contents(tmp_path / "cut")
    assert len(kept) == after + 1
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").iterdir()}
    assert sample_to(tmp_path / "cut", model, 7, **OPTIONS) == 7 - after
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == time for name, time in times.items())
    assert sample_to(tmp_path / "cut", model, 7, **OPTIONS) == 0


def test_images_of_other_options_or_of_another_model_are_refused(
    model: Diffusion, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    sample_to(folder, model, 2, **OPTIONS)
    before = contents(folder)
    for name, value in {"seed": 4, "steps": 3, "batch_size": 2, "sampler": "base"}.items():
        with pytest.raises(UsageError, match=f"{name}: recorded"):
            sample_to(folder, model, 2, **{**OPTIONS, name: value})
    with pytest.raises(UsageError, match="num_images was 2, now 3"):
        sample_to(folder, model, 3, **OPTIONS)
    with torch.no_grad():
        model.denoiser.conv_out.bias.add_(1.0)
    with pytest.raises(UsageError, match="model: recorded"):
        sample_to(folder, model, 2, **OPTIONS)
    assert contents(folder) == before


def test_a_foreign_folder_is_refused_and_a_stray_is_not(model: Diffusion, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.png").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    for place in ("a", "file"):
        with pytest.raises(UsageError, match="exists already"):
            sample_to(tmp_path / place, model, 1, **OPTIONS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".sample.json.999999999.tmp").write_bytes(b"{")
    assert sample_to(tmp_path / "b", model, 1, **OPTIONS) == 1
    assert sorted(contents(tmp_path / "b")) == ["000000.png", "sample.json"]
    (tmp_path / "b" / "sample.json").write_text("{}{")
    with pytest.raises(InputError, match=r"sample\.json"):
        sample_to(tmp_path / "b", model, 1, **OPTIONS)


def test_captions_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"c\.txt: cannot be read as UTF-8"):
        captions_of(tmp_path / "c.txt")
