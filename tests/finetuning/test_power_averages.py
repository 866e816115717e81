"""Power-function averages (EDM2, arXiv 2312.02696): their profiles, their sums, and `demerge ema`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.errors import Preempted, UsageError
from demerge.finetuning import FinetuneOptions, finetune
from demerge.finetuning.options import ReaverageOptions
from demerge.finetuning.power_averages import exponent, fit_profile, profile
from demerge.finetuning.reaveraging import plan
from demerge.timesteps import TimestepRange

FAST = FinetuneOptions(
    max_train_steps=24,
    train_batch_size=4,
    checkpointing_steps=5,
    learning_rate=1e-3,
    ema_lengths=(0.05, 0.1),
)
SPAN = TimestepRange(0, 500)


def train(
    base: Diffusion,
    data: ImageData,
    out: Path,
    options: FinetuneOptions = FAST,
    stop_at: int | None = None,
    span: TimestepRange = SPAN,
) -> Path:
    steps = iter(range(1, 1000))
    for _ in finetune(base, data, [span], options, out, stop=lambda: next(steps) == stop_at):
        pass
    return out / str(span)


# -- profiles --------------------------------------------------------------------------------------


@pytest.mark.parity
def test_lengths_have_the_exponents_of_the_paper() -> None:
    """Section 3.1: gamma 16.97 for 0.05, 6.94 for 0.10."""
    assert exponent(0.05) - 1 == pytest.approx(16.97, abs=0.01)
    assert exponent(0.10) - 1 == pytest.approx(6.94, abs=0.01)
    assert exponent(12**-0.5) == pytest.approx(1)


def test_the_profile_is_that_of_the_recursion() -> None:
    rng = np.random.default_rng(0)
    theta, mean = rng.normal(size=40), 0.0
    for t in range(1, 31):
        beta = (1 - 1 / t) ** exponent(0.07)
        mean = beta * mean + (1 - beta) * theta[t - 1]
    weights = profile(0.07, 30, 40)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    assert weights @ theta == pytest.approx(mean)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.28])
def test_the_length_is_the_width_of_the_profile(sigma_rel: float) -> None:
    weights, t = profile(sigma_rel, 20_000, 20_000), (np.arange(20_000) + 0.5) / 20_000
    mean = weights @ t
    assert np.sqrt(weights @ (t - mean) ** 2) == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize(
    ("snapshots", "bound"), [(8, 0.02), (16, 0.005), (64, 0.001)], ids=["8", "16", "64"]
)
def test_lengths_between_the_stored_ones_are_sums_of_them(snapshots: int, bound: float) -> None:
    steps = 2048
    times = [steps * (i + 1) // snapshots for i in range(snapshots)]
    stored = [(length, step) for length in (0.05, 0.1) for step in times]
    for sigma_rel in (0.05, 0.06, 0.075, 0.09, 0.1):
        weights, error = fit_profile(stored, sigma_rel, steps)
        assert weights.sum() == pytest.approx(1)
        assert error < bound


# -- an expert of another length -------------------------------------------------------------------


@pytest.fixture(scope="module")
def expert(tiny: Path, data: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert of 24 steps, with snapshots of 0.05 and 0.1 each three steps."""
    return train(Diffusion.load(tiny), data, tmp_path_factory.mktemp("expert"))


def parameters(folder: Path) -> torch.Tensor:
    model = Diffusion.load(folder).denoiser
    return torch.cat([p.flatten() for p in model.parameters()]).double()


def make(run: Path, sigma_rel: float, out: Path) -> Path:
    plan(ReaverageOptions(run=run, sigma_rel=sigma_rel, out=out)).run()
    return out


def test_the_sum_is_the_average_that_is_tracked_directly(
    tiny: Path, data: ImageData, expert: Path, tmp_path: Path
) -> None:
    """Within the error of the profile: |sum (p - q) theta| <= |p - q|_1 max |theta_i - theta_T|."""
    options = replace(FAST, ema_lengths=(0.075,))
    direct = make(train(Diffusion.load(tiny), data, tmp_path / "d", options), 0.075, tmp_path / "a")
    planned = plan(ReaverageOptions(run=expert, sigma_rel=0.075, out=tmp_path / "b"))
    planned.run()
    assert planned.error < 0.05
    steps = FAST.max_train_steps
    stored = [(each.sigma_rel, each.step) for each in planned.snapshots]
    sums = sum(
        w * profile(length, step, steps)
        for w, (length, step) in zip(planned.weights, stored, strict=True)
    )
    assert np.abs(sums - profile(0.075, steps, steps)).sum() < 0.05
    a, b, base = parameters(tmp_path / "a"), parameters(tmp_path / "b"), parameters(tiny)
    assert (a - b).norm() < 0.05 * (a - base).norm()
    assert (a - parameters(make(expert, 0.2, tmp_path / "c"))).norm() > 5 * (a - b).norm()
    assert direct.is_dir()


def test_a_stored_length_is_its_last_snapshot(expert: Path, tmp_path: Path) -> None:
    """The exact parameters before folding are in the snapshot; a layer without W shows them."""
    made = Diffusion.load(make(expert, 0.05, tmp_path / "made")).denoiser
    snapshot = load_file(expert / "ema" / "0.05-00000024.safetensors")
    torch.testing.assert_close(
        made.get_parameter("conv_in.weight"), snapshot["conv_in.weight"], rtol=0, atol=1e-7
    )
    name = "down_blocks.0.downsamplers.0.conv"
    W = snapshot[f"{name}.parametrizations.weight.0.W"]
    K = snapshot[f"{name}.parametrizations.weight.original"]
    folded = (W @ K.flatten(1)).view_as(K)
    torch.testing.assert_close(made.get_parameter(f"{name}.weight"), folded, rtol=0, atol=1e-6)


def test_it_is_a_stock_pipeline_that_records_its_length(expert: Path, tmp_path: Path) -> None:
    out = make(expert, 0.07, tmp_path / "made")
    assert type(diffusers.DiffusionPipeline.from_pretrained(out)) is diffusers.DDPMPipeline
    before, after = (json.loads((f / "expert.json").read_text()) for f in (expert, out))
    assert (before.pop("sigma_rel"), after.pop("sigma_rel")) == (None, 0.07)
    assert before == after
    assert (out / "unet" / "config.json").read_bytes() == (
        expert / "unet" / "config.json"
    ).read_bytes()


def test_the_averages_change_no_bit_of_the_expert(
    tiny: Path, data: ImageData, expert: Path, tmp_path: Path
) -> None:
    plain = train(Diffusion.load(tiny), data, tmp_path, replace(FAST, ema_lengths=()))
    assert not (plain / "ema").exists()
    assert Diffusion.load(plain).sha256 == Diffusion.load(expert).sha256


def test_a_resumed_run_has_the_same_snapshots(
    tiny: Path, data: ImageData, expert: Path, tmp_path: Path
) -> None:
    for stop_at in (7, 11, 1):
        with pytest.raises(Preempted):
            train(Diffusion.load(tiny), data, tmp_path, stop_at=stop_at)
    again = train(Diffusion.load(tiny), data, tmp_path)
    files = {path.name: path.read_bytes() for path in (expert / "ema").iterdir()}
    assert len(files) == 16
    assert {path.name: path.read_bytes() for path in (again / "ema").iterdir()} == files


def test_other_lengths_are_other_settings(tiny: Path, data: ImageData, expert: Path) -> None:
    options = replace(FAST, ema_lengths=(0.05,))
    with pytest.raises(UsageError, match="ema_lengths was"):
        train(Diffusion.load(tiny), data, expert.parent, options)


def test_some_layers_of_the_joint_control(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    base, joint = Diffusion.load(tiny), TimestepRange(0, 1000)
    options = replace(FAST, max_train_steps=8, save_dtype="float16")
    layers = ["conv_in", "down_blocks.0.downsamplers.0.conv"]
    for _ in finetune(base, data, [joint], options, tmp_path / "run", layers=layers):
        pass
    out = make(tmp_path / "run" / str(joint), 0.1, tmp_path / "made")
    made = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.float16}
    before = base.denoiser.state_dict()
    changed = {
        name for name, tensor in made.items() if not torch.equal(tensor, before[name].half())
    }
    assert {name.rpartition(".")[0] for name in changed} == set(layers)


def test_the_kept_projection_is_averaged_too(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    options = replace(FAST, max_train_steps=8, projection="paper")
    run = train(Diffusion.load(tiny), data, tmp_path / "run", options)
    made = Diffusion.load(make(run, 0.05, tmp_path / "made")).denoiser
    snapshot = load_file(run / "ema" / "0.05-00000008.safetensors")
    name = "down_blocks.0.projection.W"
    torch.testing.assert_close(made.get_parameter(name), snapshot[name], rtol=0, atol=1e-7)


@pytest.mark.gpu
def test_a_captured_run_has_the_same_snapshots_after_a_resume(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    """Previews are drawn too: neither they nor the averages change a bit, and graphs take them in."""
    base = Diffusion.load(tiny, device="cuda")
    options = replace(FAST, cuda_graph="on")
    plain = train(base, data, tmp_path / "plain", replace(options, ema_lengths=()))
    watched = replace(options, preview_steps=4, num_previews=2)
    whole = train(base, data, tmp_path / "whole", watched)
    with pytest.raises(Preempted):
        train(base, data, tmp_path / "cut", watched, stop_at=7)
    again = train(base, data, tmp_path / "cut", watched)
    assert Diffusion.load(plain).sha256 == Diffusion.load(whole).sha256
    for path in (whole / "ema").iterdir():
        assert (again / "ema" / path.name).read_bytes() == path.read_bytes()
    last = load_file(whole / "ema" / "0.05-00000024.safetensors")["conv_in.weight"]
    first = load_file(whole / "ema" / "0.05-00000003.safetensors")["conv_in.weight"]
    assert not torch.equal(first, last)
