"""`--projection paper`: W behind the blocks of a UNet, trained, stored, loaded again, and never left out."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights

from demerge.data import ImageData
from demerge.diffusion.ensemble import load_routed
from demerge.diffusion.model import Diffusion
from demerge.diffusion.options import SamplingOptions
from demerge.diffusion.projection import (
    BlockProjection,
    attach_to_blocks,
    find_blocks,
    has_projection,
)
from demerge.diffusion.sampling import sample
from demerge.errors import InputError, Preempted, UsageError
from demerge.finetuning import FinetuneOptions, finetune
from demerge.finetuning.checkpoint import newest_state
from demerge.finetuning.trainer import ExpertTraining, Job
from demerge.inspection import inspect_model
from demerge.merging import merge
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.layout import PROJECTED, locate
from demerge.timesteps import TimestepRange

FAST = FinetuneOptions(
    max_train_steps=4,
    train_batch_size=4,
    checkpointing_steps=2,
    learning_rate=1e-2,
    projection="paper",
)
SPANS = [TimestepRange(0, 500), TimestepRange(500, 1000)]
SPAN = SPANS[0]
SD14 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def train(base: Path, data: ImageData, out: Path, stop_at: int | None = None, **o: Any) -> Path:
    steps = itertools.count(1)
    for _ in finetune(
        Diffusion.load(base),
        data,
        [SPAN],
        replace(FAST, **o),
        out,
        stop=lambda: next(steps) == stop_at,
    ):
        pass
    return out / str(SPAN)


@pytest.fixture(scope="module")
def expert(tiny: Path, data: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny, data, tmp_path_factory.mktemp("paper"))


def inputs_of(model: Diffusion, n: int = 2) -> tuple[torch.Tensor, torch.Tensor, Any]:
    torch.manual_seed(0)
    t = torch.tensor([3, 900])
    return torch.randn(n, *model.sample_shape), t, model.condition(n, ["a", "b"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_identity_start_is_bit_exact(
    tiny: Path, tiny_text: Path, dtype: torch.dtype | None
) -> None:
    for folder in (tiny, tiny_text):
        plain = Diffusion.load(folder)
        mixed = plain.with_denoiser(attach_to_blocks(copy.deepcopy(plain.denoiser)))
        assert has_projection(mixed.denoiser) and not has_projection(plain.denoiser)
        inputs = inputs_of(plain)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            assert torch.equal(plain.predict(*inputs), mixed.predict(*inputs))


def test_w_maps_the_hidden_states_of_every_block_and_no_skip(tiny: Path) -> None:
    plain = Diffusion.load(tiny).denoiser
    mixed = attach_to_blocks(copy.deepcopy(plain))
    blocks = list(find_blocks(mixed))
    assert len(blocks) == 5
    torch.manual_seed(1)
    with torch.no_grad():
        for block in blocks:
            block.projection.W.add_(0.1 * torch.randn_like(block.projection.W))
    h, temb = torch.randn(2, 8, 4, 4), torch.randn(2, 32)
    with torch.no_grad():
        hidden, skips = plain.down_blocks[1](h, temb)
        mapped, same = mixed.down_blocks[1](h, temb)
    W = mixed.down_blocks[1].projection.W
    expected = torch.einsum("ij,bjhw->bihw", W, hidden)
    torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(skips, same, strict=True))
    again = attach_to_blocks(copy.deepcopy(mixed))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        assert torch.equal(mixed(x, t).sample, again(x, t).sample)
        assert not torch.allclose(mixed(x, t).sample, plain(x, t).sample, atol=1e-3)


def test_share_of_parameters_on_stable_diffusion_is_the_papers() -> None:
    with init_empty_weights():
        unet = diffusers.UNet2DConditionModel(**SD14)
        before = sum(p.numel() for p in unet.parameters())
        attach_to_blocks(unet)
    after = sum(p.numel() for p in unet.parameters())
    assert before == 859_520_964
    assert sum(isinstance(module, BlockProjection) for module in unet.modules()) == 9
    assert round(100 * (after - before) / after, 2) == 1.06


def test_all_w_train_and_lie_in_averages_and_checkpoints(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    run = ExpertTraining(Job(Diffusion.load(tiny), data, FAST, {}), SPAN, tmp_path)
    run.take_step()
    run.save_checkpoint()
    names = {name for name in run.parameters if name.endswith("projection.W")}
    assert len(names) == 5
    assert not any(torch.equal(run.parameters[n], torch.eye(len(run.parameters[n]))) for n in names)
    snapshot = newest_state(tmp_path)
    assert snapshot is not None
    tensors = snapshot.tensors()
    assert all(f"{kind}.{name}" in tensors for kind in ("model", "ema") for name in names)
    weights = [group["weight_decay"] for group in run.optimizer.param_groups]
    assert len(weights) == 2 and weights[1] == 0.0


def test_loaded_expert_is_the_trained_one(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    run = ExpertTraining(Job(Diffusion.load(tiny), data, FAST, {}), SPAN, tmp_path / "state")
    for _ in run.train(lambda: False):
        pass
    trained = run.base.with_denoiser(run.averaged_denoiser())
    run.job.inputs["base_sha256"] = run.base.sha256
    run.finish(tmp_path / "expert")
    loaded, inputs = Diffusion.load(tmp_path / "expert"), inputs_of(trained)
    with torch.no_grad():
        assert torch.equal(loaded.predict(*inputs), trained.predict(*inputs))
    assert loaded.identity["sha256"] == trained.sha256 != run.base.sha256


def test_expert_works_in_sampling_and_in_the_routed_ensemble(
    tiny: Path, expert: Path, tmp_path: Path, add_expert: Callable[..., Path]
) -> None:
    record = json.loads((expert / "expert.json").read_text())
    assert record["options"]["projection"] == "paper"
    o = SamplingOptions(steps=2)
    images = sample(Diffusion.load(expert), 2, o, seed=0)
    assert not torch.equal(images, sample(Diffusion.load(tiny), 2, o, seed=0))
    shutil.copytree(expert, tmp_path / "0000-0500")
    add_expert(tmp_path / "0500-1000", 500, 1000)
    ensemble = load_routed(tiny, tmp_path)
    x, t, c = inputs_of(ensemble)
    with torch.no_grad():
        own = Diffusion.load(expert).predict(x, t, c)
    torch.testing.assert_close(ensemble.predict(x, t, c)[0], own[0])


@pytest.mark.parametrize("changes", [{}, {"use_ema": False, "gradient_checkpointing": True}])
def test_a_resumed_run_gives_the_same_bytes(
    tiny: Path, data: ImageData, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = train(tiny, data, tmp_path / "whole", **changes)
    with pytest.raises(Preempted):
        train(tiny, data, tmp_path / "cut", stop_at=3, **changes)
    cut = train(tiny, data, tmp_path / "cut", **changes)
    for name in (f"unet/{PROJECTED}", "unet/config.json", "log.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_stock_loaders_fail(expert: Path) -> None:
    with pytest.raises(OSError, match="no file named"):
        diffusers.DiffusionPipeline.from_pretrained(expert)
    with pytest.raises(OSError, match="no file named"):
        diffusers.UNet2DModel.from_pretrained(expert / "unet")


def test_plain_saving_and_merging_are_refused(tiny: Path, expert: Path, tmp_path: Path) -> None:
    refused = pytest.raises((UsageError, InputError), match="--projection paper")
    with refused as error:
        Diffusion.load(expert).save(tmp_path / "plain")
    assert "--projection foldable" in str(error.value.fix) and not (tmp_path / "plain").exists()
    for path in (expert, expert / "unet", expert / "unet" / PROJECTED):
        with refused as error:
            locate(path)
        assert "--projection foldable" in str(error.value.fix)
        with refused:
            Checkpoint.open(path)
        for base, tuned in ((tiny, path), (path, tiny)):
            with refused:
                merge(base, [tuned], tmp_path / "out", method="task_arithmetic")
    assert not list(tmp_path.iterdir())
    facts = inspect_model(expert)
    assert not facts.mergeable and "--projection paper" in facts.note


def test_dit_is_refused(tiny_dit: Path, data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not of a DiTTransformer2DModel"):
        train(tiny_dit, data, tmp_path)


def test_a_base_with_w_keeps_them(expert: Path, data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="so its experts do too"):
        train(expert, data, tmp_path, projection="foldable")
    second = Diffusion.load(train(expert, data, tmp_path)).denoiser
    first = Diffusion.load(expert).denoiser
    assert list(first.state_dict()) == list(second.state_dict())


def test_w_train_beside_chosen_layers(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    base = Diffusion.load(tiny)
    run = ExpertTraining(Job(base, data, FAST, {}, ["conv_out"]), SPAN, tmp_path)
    run.take_step()
    moved = {
        name
        for name, p in run.averaged_denoiser().named_parameters()
        if name in base.denoiser.state_dict()
        and not torch.equal(p, base.denoiser.get_parameter(name))
    }
    assert moved == {"conv_out.weight", "conv_out.bias"}
    assert sum(name.endswith("projection.W") for name in run.parameters) == 5
