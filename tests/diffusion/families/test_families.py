"""Each family draws what its stock pipeline draws, and is measured, trained, saved and routed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from demerge.analysis import MeasurementOptions, measure
from demerge.data import ImageData, load_images
from demerge.diffusion.ensemble import load_routed
from demerge.diffusion.model import Diffusion
from demerge.diffusion.options import SamplingOptions
from demerge.diffusion.routing import RoutedDenoiser
from demerge.diffusion.sampling import ImageSampler, make_scheduler, sample
from demerge.errors import InputError, UsageError
from demerge.finetuning import FinetuneOptions, finetune
from demerge.finetuning.objective import draw_timesteps, loss_weights
from demerge.randomness import normal
from demerge.statistics.fisher import range_fisher
from demerge.timesteps import Partition, TimestepRange

Family = Callable[[str], Path]
FAMILIES = ["sdxl", "sd3", "flux", "wan", "bert"]
FLOWS = ["sd3", "flux", "wan"]
FAST = FinetuneOptions(
    max_train_steps=2, train_batch_size=2, checkpointing_steps=10, learning_rate=1e-3
)


def load(folder: Path, **options: Any) -> Diffusion:
    return Diffusion.load(folder, resolution=16, **options)


@pytest.fixture
def data(image_folder: Path) -> ImageData:
    return load_images(image_folder, resolution=16, channels=3)


# -- agreement with diffusers ----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", [*FAMILIES, "taef2"])
def test_images_are_those_of_the_stock_pipeline(
    tiny_family: Family, name: str, scale: float
) -> None:
    folder, prompts = tiny_family(name), ["a cat", "dogs on a hill"]
    model = load(folder)
    options = SamplingOptions(steps=4, sampler="base", guidance_scale=scale)
    sampler = ImageSampler(model, options, 5, prompts)
    noise = normal(model.sample_shape, 5, "image", samples=range(2))
    ours = sampler.draw(range(2)).permute(0, 2, 3, 1).numpy()

    stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"prompt": prompts, "num_inference_steps": 4, "output_type": "np"}
    given |= {"guidance_scale": scale, "height": 16, "width": 16}
    if name == "wan":
        images = stock(**given, num_frames=1, latents=noise, max_sequence_length=512).frames[:, 0]
    else:
        packed = noise if name != "flux" else stock._pack_latents(noise, 2, 4, 8, 8)
        images = stock(**given, latents=packed).images
    assert np.abs(ours - np.round(images * 255)).max() <= 1


@pytest.mark.parametrize("name", FLOWS)
def test_ddim_of_a_flow_is_euler_on_the_stock_timesteps(tiny_family: Family, name: str) -> None:
    model = load(tiny_family(name))
    scheduler = make_scheduler(model, 6, "ddim")
    assert isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert float(scheduler.timesteps[0]) == 1000.0
    x, v, t = torch.randn(2, 3), torch.randn(2, 3), scheduler.timesteps
    first, second = float(t[0]) / 1000, float(t[1]) / 1000
    torch.testing.assert_close(scheduler.step(v, t[0], x).prev_sample, x + (second - first) * v)


def test_a_flow_is_the_line_from_the_image_to_noise(tiny_family: Family) -> None:
    model = load(tiny_family("sd3"))
    x0, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([0.0, 250.5, 1000.0])
    x_t = model.add_noise(x0, noise, t)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[2], noise[2])
    torch.testing.assert_close(x_t[1], 0.7495 * x0[1] + 0.2505 * noise[1])
    assert torch.equal(model.target(x0, noise, t), noise - x0)
    assert (model.prediction_type, model.shift) == ("flow_prediction", 3.0)


def test_the_shift_of_flux_follows_the_resolution(tiny_family: Family) -> None:
    """mu is linear in the number of tokens; 256 of them give 0.5, 4096 give 1.15."""
    folder = tiny_family("flux")
    for side, mu in ((64, 0.5), (256, 1.15)):
        model = Diffusion.load(folder, resolution=side)
        assert model.family.tokens == (side // 4) ** 2
        assert model.shift == pytest.approx(np.exp(mu))
    assert load(folder).sample_shape == (4, 8, 8)


# -- training draws and weights --------------------------------------------------------------------

DENSITIES: list[dict[str, Any]] = [
    {"density": "uniform"},
    {"density": "logit-normal", "logit_mean": 0.5, "logit_std": 1.3},
    {"density": "mode", "mode_scale": 1.29},
]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("density", DENSITIES)
def test_draws_of_the_ranges_are_the_draws_of_all_restricted_to_them(
    density: dict[str, Any], shift: float
) -> None:
    """Inside a range the draws have the density of all draws; shares agree with frequencies."""
    spans = [TimestepRange(0, 300), TimestepRange(300, 875), TimestepRange(875, 1000)]
    everything = FinetuneOptions(global_prob=1.0, **density)
    t = draw_timesteps(spans[0], 1000, everything, 0, range(20_000), shift)
    assert t.dtype == torch.float32 and float(t.min()) >= 0 and float(t.max()) < 1000
    for span in spans:
        inside = FinetuneOptions(global_prob=0.0, **density)
        own = draw_timesteps(span, 1000, inside, 1, range(4000), shift)
        assert all(value in span for value in own.tolist())
        whole = t[(t >= span.start) & (t < span.stop)]
        if len(whole) > 300:
            q = torch.linspace(0.05, 0.95, 10)
            apart = (whole.quantile(q) - own.quantile(q)).abs().max()
            assert float(apart) < 0.08 * len(span)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 17.0])
@pytest.mark.parametrize("boundary", [0.417, 0.875, 0.9])
def test_training_and_the_stock_pipeline_agree_on_who_owns_t(boundary: float, shift: float) -> None:
    """WanPipeline asks `transformer` for t >= boundary_ratio T, for every number of steps."""
    partition = Partition.from_boundary(boundary, 1000)
    options = FinetuneOptions(global_prob=0.0)
    for side, span in enumerate(partition):
        for t in draw_timesteps(span, 1000, options, 3, range(500), shift).tolist():
            assert (t >= boundary * 1000) == bool(side) and partition.route(t) == side
    for steps in (1, 2, 3, 8, 20, 50, 333):
        euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        unipc = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        for scheduler in (euler, unipc):
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps.tolist():
                assert partition.route(t) == int(t >= boundary * 1000)


def test_loss_weights_of_a_flow_are_those_on_x0(tiny_family: Family) -> None:
    """|x_0 - x_hat|^2 = sigma^2 |y - y_hat|^2, so a weight on x_0 is divided by 1 / sigma^2."""
    model = load(tiny_family("sd3"))
    snr, sigma = model.snr(), (torch.arange(1000).double() + 0.5) / 1000
    torch.testing.assert_close(snr, ((1 - sigma) / sigma) ** 2)
    on_x0 = {
        "min-snr": snr.clamp(max=5),
        "truncated-snr": snr.clamp(min=1),
        "snr+1": snr + 1,
        "p2": snr / (1 + snr),
    }
    for name, expected in on_x0.items():
        weights = loss_weights(model, FinetuneOptions(loss_weight=name))
        torch.testing.assert_close(weights, expected * sigma**2)
    assert torch.all(loss_weights(model, FinetuneOptions()) == 1)


# -- the whole path --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_measured_trained_and_saved(
    tiny_family: Family, name: str, data: ImageData, tmp_path: Path
) -> None:
    folder = tiny_family(name)
    model = load(folder / "transformer" if name == "wan" else folder)
    map = measure(model, data, MeasurementOptions(bins=2, groups=5, batch_size=2, engine="exact"))
    assert np.isfinite(map.gram).all()
    assert range_fisher(model, data, TimestepRange(500, 1000), samples=2).tensors
    span = TimestepRange(500, 1000)
    for _ in finetune(model, data, [span], FAST, tmp_path):
        pass
    expert = tmp_path / str(span)
    own = load(expert)
    assert own.sha256 != model.sha256 and own.parameters == model.parameters
    stock = diffusers.DiffusionPipeline.from_pretrained(expert)
    part = stock.unet if hasattr(stock, "unet") else stock.transformer
    assert all(
        torch.equal(part.state_dict()[key], value)
        for key, value in own.denoiser.state_dict().items()
    )


def test_a_pipeline_of_two_denoisers_is_a_routed_ensemble(
    tiny_family: Family, tmp_path: Path
) -> None:
    folder = tiny_family("wan")
    pair = load(folder)
    assert isinstance(pair.denoiser, RoutedDenoiser)
    assert pair.denoiser.partition == Partition.from_cuts(1000, [875])
    high, low = load(folder / "transformer"), load(folder / "transformer_2")
    x, t = torch.randn(3, *pair.sample_shape), torch.tensor([1000.0, 875.0, 874.9])
    condition = pair.condition(3, ["a", "b", "c"])
    with torch.no_grad():
        both = pair.predict(x, t, condition)
        torch.testing.assert_close(both[:2], high.predict(x, t, condition)[:2])
        torch.testing.assert_close(both[2], low.predict(x, t, condition)[2])
    with pytest.raises(InputError, match="has two denoisers") as refused:
        Diffusion.load(folder, pairs=False)
    assert "transformer_2" in refused.value.fix
    pair.save(tmp_path / "pair")
    assert load(tmp_path / "pair").sha256 == pair.sha256
    low.save(tmp_path / "low")
    assert load(tmp_path / "low").sha256 == low.sha256
    options = SamplingOptions(steps=3)
    drawn = sample(pair, 2, options, captions=["a"])
    for name, side in (("0875-1000", "transformer"), ("0000-0875", "transformer_2")):
        load(folder / side).save(tmp_path / "experts" / name)
        record = {"format": "demerge.expert/1", "range": [int(edge) for edge in name.split("-")]}
        (tmp_path / "experts" / name / "expert.json").write_text(json.dumps(record))
    again = load_routed(high, tmp_path / "experts")
    assert torch.equal(sample(again, 2, options, captions=["a"]), drawn)


def test_the_empty_caption_of_sdxl_is_zeros_if_the_pipeline_says_so(tiny_family: Family) -> None:
    model = load(tiny_family("sdxl"))
    """Guidance takes it, and so does training where it drops captions."""
    empty, both = model.no_condition(1), model.condition(2, ["", "a"])
    for name in ("encoder_hidden_states", "text_embeds"):
        assert float(empty[name].abs().max()) == float(both[name][0].abs().max()) == 0
        assert float(both[name][1].abs().max()) > 0
    assert empty["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]


def test_sd3_may_lack_its_t5(tiny_family: Family, tmp_path: Path) -> None:
    stock = diffusers.StableDiffusion3Pipeline.from_pretrained(
        tiny_family("sd3"), text_encoder_3=None, tokenizer_3=None
    )
    stock.save_pretrained(tmp_path / "two")
    model = load(tmp_path / "two")
    ours = model.condition(1, ["a cat"])
    theirs, _, pooled, _ = stock.encode_prompt("a cat", None, None, device="cpu")
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs)
    torch.testing.assert_close(ours["pooled_projections"], pooled)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_text_encoder_that_is_missing_is_named(
    tiny_family: Family, name: str, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_family(name), tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": [None, None]}))
    with pytest.raises(InputError, match="without both of its text encoders"):
        load(copy)


def test_a_resolution_fits_the_patches(tiny_family: Family) -> None:
    with pytest.raises(UsageError, match="resolution is 15") as refused:
        Diffusion.load(tiny_family("flux"), resolution=15)
    assert "12" in refused.value.fix and "multiples of 4" in refused.value.what


def test_captions_are_needed(tiny_family: Family) -> None:
    with pytest.raises(UsageError, match="takes text"):
        sample(load(tiny_family("sd3")), 1)
