"""Routing: each sample goes to the expert of its timestep, by the value of t."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from demerge.diffusion.adapters import is_lora_path, load_model
from demerge.diffusion.ensemble import load_routed, routed
from demerge.diffusion.model import Diffusion
from demerge.diffusion.options import SamplingOptions
from demerge.diffusion.sampling import make_scheduler, sample
from demerge.errors import InputError, UsageError
from demerge.evaluation.models import detect_kind
from demerge.expert import SPEC_RANGE
from demerge.timesteps import Partition

SIDES = ("low", "high")


@pytest.fixture
def model(tiny: Path) -> Diffusion:
    return Diffusion.load(tiny)


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


@pytest.fixture
def ensemble(model: Diffusion) -> Diffusion:
    """Four experts that differ in the bias of their output, 0 to 3."""
    experts = [copy.deepcopy(model.denoiser) for _ in range(4)]
    with torch.no_grad():
        for number, expert in enumerate(experts):
            expert.conv_out.bias.add_(float(number))
    return routed(model, Partition.from_cuts(1000, [100, 450, 451]), experts)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
@torch.no_grad()
def test_rows_of_one_expert_are_computed_together(ensemble: Diffusion, dtype: torch.dtype) -> None:
    """As bits, each expert's rows are what that expert makes of them in one batch."""
    denoiser = ensemble.denoiser
    x = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([450, 0, 99, 100, 999, 449, 451, 450, 1], dtype=dtype)
    routes = torch.tensor([denoiser.partition.route(value) for value in t.tolist()])
    expected = torch.empty_like(x)
    for route, expert in enumerate(denoiser.experts):
        rows = (routes == route).nonzero().flatten()
        expected[rows] = expert(x[rows], t[rows]).sample
    assert torch.equal(denoiser(x, t).sample, expected)


@torch.no_grad()
def test_a_fraction_below_a_boundary_stays_below(ensemble: Diffusion) -> None:
    x, t = torch.zeros(3, 1, 8, 8), torch.tensor([99.9, 100.0, 450.5])
    parts = [ensemble.denoiser.experts[i](x[:1], t[i : i + 1]).sample for i in range(3)]
    assert torch.equal(ensemble.denoiser(x, t).sample, torch.cat(parts))


@pytest.mark.parametrize("t", [1001, -1, torch.tensor([5, 1001]), torch.tensor([-0.5, 5.0])])
def test_a_timestep_outside_the_ranges_is_refused(ensemble: Diffusion, t: object) -> None:
    with pytest.raises(UsageError, match="lies outside"):
        ensemble.denoiser(torch.zeros(2, 1, 8, 8), t)


def test_one_timestep_for_all_asks_one_expert(
    ensemble: Diffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "bucketize", None)  # mixed timesteps alone need it
    with torch.no_grad():
        prediction = ensemble.denoiser(torch.zeros(2, 1, 8, 8), 450).sample
        expected = ensemble.denoiser.experts[2](torch.zeros(2, 1, 8, 8), 450).sample
    assert torch.equal(prediction, expected)
    assert len(sample(ensemble, 2, SamplingOptions(steps=3), seed=0)) == 2


def test_ensemble_of_copies_is_the_base(model: Diffusion) -> None:
    ensemble = routed(
        model, Partition.uniform(1000, 2), [model.denoiser, copy.deepcopy(model.denoiser)]
    )
    assert torch.equal(
        sample(ensemble, 3, SamplingOptions(steps=5), seed=1),
        sample(model, 3, SamplingOptions(steps=5), seed=1),
    )


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


def test_experts_of_a_dit_are_routed(tiny_dit: Path) -> None:
    model = Diffusion.load(tiny_dit)
    ensemble = routed(
        model, Partition.from_cuts(1000, [500]), [model.denoiser, copy.deepcopy(model.denoiser)]
    )
    images = sample(ensemble, 3, SamplingOptions(steps=2), seed=0)
    assert (
        int((images.int() - sample(model, 3, SamplingOptions(steps=2), seed=0).int()).abs().max())
        <= 1
    )


def save_lora(file: Path, size: float, span: str | None = None) -> None:
    """Save a LoRA of the tiny UNet, as other trainers do."""
    name = "unet.mid_block.attentions.0.to_q"
    factors = {"lora_A": torch.ones(1, 16), "lora_B": torch.full((16, 1), size)}
    tensors = {f"{name}.{part}.weight": tensor for part, tensor in factors.items()}
    save_file(tensors, file, None if span is None else {SPEC_RANGE: span})


def test_files_of_other_trainers_are_a_routed_ensemble(model: Diffusion, tmp_path: Path) -> None:
    low, high = (tmp_path / f"pytorch_lora_weights_{side}_noise.safetensors" for side in SIDES)
    save_lora(low, 0.1), save_lora(high, 0.2)
    assert detect_kind(tmp_path) == "ensemble" and not is_lora_path(tmp_path)
    with pytest.raises(InputError, match=r"where its range ends is not known"):
        load_routed(model, tmp_path)
    others = [copy.deepcopy(model.denoiser) for _ in range(2)]
    with torch.no_grad():
        others[1].conv_out.bias.add_(1.0)
    base = routed(model, Partition.from_boundary(0.875, 1000), others)
    own = [
        load_model(file, model.with_denoiser(o))
        for file, o in zip((low, high), others, strict=True)
    ]
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([874, 875])
    with torch.no_grad():
        expected = torch.cat([own[i].predict(x[i : i + 1], t[i : i + 1]) for i in range(2)])
        found = load_routed(base, tmp_path)
        torch.testing.assert_close(found.predict(x, t), expected)
        save_lora(low, 0.1, "0,500"), save_lora(high, 0.2, "500,999")
        again = load_routed(model, tmp_path)
    assert again.denoiser.partition == Partition.from_cuts(1000, [500])
    low.unlink()
    assert detect_kind(tmp_path) == "model" and is_lora_path(tmp_path)
