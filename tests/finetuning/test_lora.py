"""LoRA experts: what trains, what is written, and that every reader computes what peft computes."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from demerge.data import ImageData, load_images
from demerge.diffusion.adapters import load_model, share_weights
from demerge.diffusion.encoded import EncodedData
from demerge.diffusion.ensemble import load_routed
from demerge.diffusion.model import Diffusion
from demerge.errors import InputError, NumericalError, Preempted, UsageError
from demerge.evaluation.models import detect_kind, specify_models
from demerge.expert import Expert
from demerge.finetuning import FinetuneOptions, finetune, reaveraging
from demerge.finetuning.lora import FILE, add_lora, count_trained, first_A, freeze_base
from demerge.finetuning.objective import learning_rate
from demerge.finetuning.options import ReaverageOptions
from demerge.finetuning.train import check_output, disk_of_run
from demerge.finetuning.trainer import ExpertTraining, Job
from demerge.lora import Adapter, open_expert
from demerge.storage.atomic import sha256
from demerge.timesteps import TimestepRange

peft = pytest.importorskip("peft")
SPAN = TimestepRange(0, 500)
FAST = FinetuneOptions(
    max_train_steps=4,
    train_batch_size=4,
    checkpointing_steps=2,
    logging_steps=2,
    learning_rate=1e-2,
    lora_rank=2,
    lora_alpha=3.0,
)


def train(
    base: Diffusion,
    data: ImageData,
    out: Path,
    options: FinetuneOptions = FAST,
    stop_at: int | None = None,
) -> Path:
    steps = itertools.count(1)
    for _ in finetune(base, data, [SPAN], options, out, stop=lambda: next(steps) == stop_at):
        pass
    return out / str(SPAN) / FILE


def as_peft_runs_it(base: Diffusion, file: Path) -> nn.Module:
    """The base with the file's factors, put in by peft alone."""
    model = copy.deepcopy(base.denoiser)
    targets = list(FAST.target_modules)
    config = peft.LoraConfig(r=FAST.lora_rank, lora_alpha=FAST.lora_alpha, target_modules=targets)
    peft.inject_adapter_in_model(config, model)
    factors = {name.split(".", 1)[1]: value for name, value in load_file(file).items()}
    report = peft.set_peft_model_state_dict(model, factors)
    assert not report.unexpected_keys
    assert not [name for name in report.missing_keys if "lora_" in name]
    return model.eval()


def predictions(denoiser: nn.Module) -> Tensor:
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: Tensor = denoiser(x, torch.arange(0, 600, 100)).sample
    return result


# -- what trains -----------------------------------------------------------------------------------


def test_only_factors_train_and_the_base_exists_once(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    base = Diffusion.load(tiny)
    before = base.sha256
    run = ExpertTraining(Job(base, data, FAST, {}), SPAN, tmp_path)
    assert run.parameters and all(".lora_" in name for name in run.parameters)
    own = {p.data_ptr() for p in run.denoiser.parameters() if not p.requires_grad}
    assert own == {p.data_ptr() for p in base.denoiser.parameters()}
    with torch.no_grad():  # B = 0
        assert torch.equal(predictions(run.denoiser.eval()), predictions(base.denoiser))
    run.denoiser.train()
    run.take_step()
    assert base.sha256 == before
    trained = sum(p.numel() for p in run.parameters.values())
    assert trained == count_trained(base.denoiser, FAST, None)
    assert disk_of_run(base, 1, trained, FAST) < disk_of_run(
        base, 1, trained, replace(FAST, lora_rank=None, lora_alpha=None, target_modules=())
    )


def test_convolutions_are_counted_and_read(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    base = Diffusion.load(tiny)
    options = replace(FAST, target_modules=("conv1", "conv_shortcut", "to_k"), max_train_steps=2)
    assert sum(
        p.numel() for p in add_lora(base.denoiser, options).parameters() if p.requires_grad
    ) == (count_trained(base.denoiser, options, None))
    file = train(base, data, tmp_path, options)
    adapter = open_expert(file.parent, base.denoiser.state_dict())
    assert {len(adapter[name].shape) for name in adapter} == {2, 4}


def test_all_experts_start_with_one_A_of_the_seed(tiny: Path) -> None:
    base = Diffusion.load(tiny)
    torch.manual_seed(1)
    first = {n: p for n, p in add_lora(base.denoiser, FAST).named_parameters() if p.requires_grad}
    torch.manual_seed(2)
    second = dict(add_lora(base.denoiser, FAST).named_parameters())
    other = dict(add_lora(base.denoiser, replace(FAST, seed=1)).named_parameters())
    for name, value in first.items():
        assert torch.equal(value, second[name])
        if ".lora_B." in name:
            assert not value.any()
        else:
            assert not torch.equal(value, other[name])
            assert value.abs().max() <= value[0].numel() ** -0.5
    A = first_A(torch.empty(64, 256), 0, "x")
    assert float(A.std()) == pytest.approx((3 * 256) ** -0.5, rel=0.02)


@pytest.mark.parity
def test_steps_are_those_of_a_bare_peft_loop(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    """Loss with teacher, clip, AdamW and average, written down again with peft and torch alone."""
    base = Diffusion.load(tiny)
    options = replace(FAST, max_grad_norm=0.05)
    run = ExpertTraining(Job(base, data, options, {}), SPAN, tmp_path)
    model = copy.deepcopy(base.denoiser)
    config = peft.LoraConfig(r=2, lora_alpha=3.0, target_modules=list(options.target_modules))
    peft.inject_adapter_in_model(config, model)
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in factors.items():
        p.data = run.parameters[name].detach().clone()
    means = {name: p.detach().clone() for name, p in factors.items()}
    adamw = torch.optim.AdamW(
        factors.values(), lr=1e-2, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    for step in range(3):
        (batch,) = run.batches.step(step)
        x_t, y = base.add_noise(batch.x0, batch.noise, batch.t), batch.noise
        prediction = model(x_t, batch.t).sample
        with torch.no_grad():
            goal = base.denoiser(x_t, batch.t).sample
        loss = ((prediction - y) ** 2 + (prediction - goal) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(factors.values(), 0.05)
        adamw.step()
        adamw.zero_grad()
        decay = min(options.ema_decay, 1 - (1 + step) ** -0.75)
        for name, p in factors.items():
            means[name].lerp_(p.detach(), 1 - decay)
        assert learning_rate(options, step) == 1e-2
        assert run.take_step() == pytest.approx(loss.item(), rel=1e-5)
        run.step += 1
    run.batches.close()
    for name, p in factors.items():
        torch.testing.assert_close(run.parameters[name].detach(), p.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(run.one_step.ema[name], means[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_frozen_base_is_stored_in_the_dtype_of_the_precision(
    tiny: Path, data: ImageData, tmp_path: Path, precision: str
) -> None:
    base = Diffusion.load(tiny)
    options = replace(FAST, mixed_precision=precision, num_previews=2, preview_steps=4)
    file = train(base, data, tmp_path, options)
    assert {p.dtype for p in base.denoiser.parameters()} == {torch.float32}  # the caller's own
    assert {value.dtype for value in load_file(file).values()} == {torch.float32}
    frozen = freeze_base(base, options)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    assert {p.dtype for p in frozen.denoiser.parameters()} == {dtype}
    assert json.loads((file.parent / "expert.json").read_text())["base_sha256"] == base.sha256
    assert (file.parent / "preview.png").is_file()
    exact = train(base, data, tmp_path / "exact", replace(options, mixed_precision="no"))
    a, b = load_file(file), load_file(exact)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 0.05


def test_gradients_reach_the_factors_through_checkpointing(
    tiny_text: Path, image_folder: Path, tmp_path: Path
) -> None:
    base = Diffusion.load(tiny_text)
    captioned = load_images(image_folder, resolution=16, channels=3)
    one = replace(FAST, max_train_steps=1, checkpointing_steps=1)
    plain = train(base, captioned, tmp_path / "a", one)
    again = train(base, captioned, tmp_path / "b", replace(one, gradient_checkpointing=True))
    a, b = load_file(plain), load_file(again)
    for name in a:
        torch.testing.assert_close(a[name], b[name])
    assert any(value.any() for name, value in a.items() if "lora_B" in name)


def test_accumulation_is_one_batch(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    base = Diffusion.load(tiny)
    whole = replace(FAST, train_batch_size=8)
    parts = replace(FAST, gradient_accumulation_steps=2)
    runs = [ExpertTraining(Job(base, data, o, {}), SPAN, tmp_path) for o in (whole, parts)]
    gradients = []
    for run in runs:
        run.one_step.backward(run.batches.step(0), run.one_step.rates(0))
        gradients.append({n: p.grad for n, p in run.parameters.items() if p.grad is not None})
        run.batches.close()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7)


# -- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_resumed_run_writes_the_same_bytes(
    tiny: Path, data: ImageData, tmp_path: Path, stop_at: int
) -> None:
    base = Diffusion.load(tiny)
    whole = train(base, data, tmp_path / "whole")
    with pytest.raises(Preempted):
        train(base, data, tmp_path / "cut", stop_at=stop_at)
    (state,) = (tmp_path / "cut").rglob("tensors.safetensors")
    assert not [
        name for name in load_file(state) if name.startswith("model.") and ".lora_" not in name
    ]
    assert sha256(train(base, data, tmp_path / "cut")) == sha256(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_writes_the_same_bytes(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base, options = Diffusion.load(tiny), replace(FAST, max_train_steps=6, checkpointing_steps=1)
    start = time.perf_counter()
    whole = train(base, data, tmp_path / "whole", options)
    longest = time.perf_counter() - start
    for share in (0.3, 0.5):
        child = os.fork()
        if child == 0:
            train(base, data, tmp_path / "killed", options)
            os._exit(0)
        time.sleep(share * longest)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert sha256(train(base, data, tmp_path / "killed", options)) == sha256(whole)


def test_another_rank_does_not_continue_it(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    base = Diffusion.load(tiny)
    train(base, data, tmp_path)
    for change, text in (
        ({"lora_rank": 4}, "lora_rank was 2, now 4"),
        ({"lora_alpha": 1.0}, "lora_alpha"),
    ):
        with pytest.raises(UsageError, match=text):
            train(base, data, tmp_path, replace(FAST, **change))


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parity
def test_merged_deltas_are_what_peft_runs(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    base = Diffusion.load(tiny)
    file = train(base, data, tmp_path)
    theirs = predictions(as_peft_runs_it(base, file))
    expert = load_model(file.parent, base)
    assert not torch.allclose(theirs, predictions(base.denoiser), atol=1e-3)
    torch.testing.assert_close(predictions(expert.denoiser), theirs, rtol=1e-4, atol=1e-5)
    routed = load_routed(base, tmp_path_of_two(base, data, tmp_path / "two"))
    mixed = predictions(routed.denoiser)
    ours = predictions(expert.denoiser)
    torch.testing.assert_close(mixed[:5], ours[:5])  # t below 500
    untouched = {p.data_ptr() for p in base.denoiser.parameters()}
    shared = [p for p in expert.denoiser.parameters() if p.data_ptr() in untouched]
    assert len(shared) > len(untouched) / 2


def tmp_path_of_two(base: Diffusion, data: ImageData, out: Path) -> Path:
    for _ in finetune(base, data, [SPAN, TimestepRange(500, 1000)], FAST, out):
        pass
    return out


@pytest.mark.parity
def test_stock_diffusers_loads_it(tiny_text: Path, image_folder: Path, tmp_path: Path) -> None:
    base = Diffusion.load(tiny_text)
    captioned = load_images(image_folder, resolution=16, channels=3)
    file = train(base, captioned, tmp_path)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_text)
    pipeline.load_lora_weights(file.parent)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = base.condition(2, ["a", "b"])
    with torch.no_grad():
        theirs = pipeline.unet(x, torch.tensor([7, 400]), **states).sample
        ours = load_model(file.parent, base).predict(x, torch.tensor([7, 400]), states)
        plain = base.predict(x, torch.tensor([7, 400]), states)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-3)


FAMILIES = ["flux", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sdxl", "sd3", "wan"))]


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_pipelines_of_each_family_load_it(
    tiny_family: Callable[[str], Path], image_folder: Path, tmp_path: Path, family: str
) -> None:
    """Trained on latents and texts that were encoded before; Wan's is of its low-noise denoiser."""
    folder, of_two = tiny_family(family), family == "wan"
    base = Diffusion.load(folder)
    if of_two:  # a denoiser of its own folder
        base = Diffusion.load(folder / "transformer_2", resolution=16, pairs=False)
    data = load_images(image_folder, split="all", resolution=base.image_shape[1])
    encoded = EncodedData(base, data, tmp_path / "kept", base.identity["components"], batch=4)
    encoded.fill()
    encoded.open()
    options = replace(FAST, max_train_steps=2)
    list(finetune(base, data, [SPAN], options, tmp_path, encoders=[encoded]))
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(
        tmp_path / str(SPAN), **({"load_into_transformer_2": True} if of_two else {})
    )
    part = "transformer_2" if of_two else "unet" if family == "sdxl" else "transformer"
    models = (
        base,
        load_model(tmp_path / str(SPAN), base),
        base.with_denoiser(getattr(pipeline, part)),
    )
    x = torch.randn(1, *base.sample_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, ours, theirs = (m.predict(x, 300, base.condition(1, ["a"])) for m in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-3)


def test_the_record_is_that_of_an_expert(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    base = Diffusion.load(tiny)
    file = train(base, data, tmp_path)
    record = Expert.load(file.parent)
    assert (record.span, record.base_sha256) == (SPAN, base.sha256)
    assert (record.options["lora_rank"], record.options["projection"]) == (2, "none")
    assert not list(file.parent.rglob("config.json"))
    names = {path.name for path in file.parent.iterdir()}
    assert names == {FILE, "expert.json", "log.jsonl", "losses.csv", "losses.svg"}
    adapter = open_expert(file.parent, base.denoiser.state_dict())
    assert isinstance(adapter, Adapter) and not adapter.notes


def test_the_expert_is_of_one_base(
    tiny: Path, make_tiny: Callable[..., Path], data: ImageData, tmp_path: Path
) -> None:
    file = train(Diffusion.load(tiny), data, tmp_path)
    with pytest.raises(InputError, match="finetuned from a base of sha256"):
        load_model(file.parent, Diffusion.load(make_tiny(seed=5)))
    with pytest.raises(InputError, match="its base is not known"):
        load_model(file.parent)


def test_factors_that_their_dtype_cannot_hold_are_refused(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    options = replace(FAST, save_dtype="float16")
    run = ExpertTraining(Job(Diffusion.load(tiny), data, options, {}), SPAN, tmp_path / "state")
    next(iter(run.one_step.ema.values()))[0] = 1e6
    with pytest.raises(NumericalError, match=r"as float16 the expert holds NaN or Inf in .*lora_A"):
        run.finish(tmp_path / "expert")
    assert not (tmp_path / "expert").exists()


def test_an_average_of_another_length_is_a_lora(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    options = replace(FAST, ema_lengths=(0.1, 0.25), ema_snapshot_steps=1)
    file = train(Diffusion.load(tiny), data, tmp_path, options)
    plan = reaveraging.plan(
        ReaverageOptions(run=file.parent, sigma_rel=0.25, out=tmp_path / "made")
    )
    plan.run()
    made, stored = (
        load_file(tmp_path / "made" / FILE),
        file.parent / "ema" / "0.25-00000004.safetensors",
    )
    assert made.keys() == load_file(file).keys()
    for name, value in load_file(stored).items():
        torch.testing.assert_close(made[f"unet.{name.replace('.default', '')}"], value)
    assert Expert.load(tmp_path / "made").sigma_rel == 0.25


def test_a_joint_lora_is_the_control(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    for _ in finetune(Diffusion.load(tiny), data, [TimestepRange(0, 1000)], FAST, tmp_path):
        pass
    assert detect_kind(tmp_path / "0000-1000") == "joint"
    (spec,) = specify_models([tmp_path / "0000-1000"])
    with pytest.raises(UsageError, match="a LoRA needs its base"):
        spec.load()


# -- what cannot be --------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_by_name(
    tiny: Path, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Diffusion.load(tiny)
    for changes, text in (
        ({"projection": "paper"}, "projection is 'paper'"),
        ({"fisher_samples": 2}, "fisher_samples is 2"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"lora_rank": None}, "lora_alpha is 3.0"),
        ({"lora_rank": None, "lora_alpha": None, "target_modules": ("to_q",)}, "target_modules is"),
    ):
        with pytest.raises(UsageError, match=text):
            replace(FAST, **changes)
    for target, text in (
        ("to_x", "no module of the base has this name"),
        ("conv_norm_out", "is a GroupNorm"),
    ):
        with pytest.raises(UsageError, match=text):
            check_output(base, data, [SPAN], replace(FAST, target_modules=(target,)), tmp_path)
    with pytest.raises(UsageError, match="both choose what trains"):
        check_output(base, data, [SPAN], FAST, tmp_path, layers=["conv_in"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"needs the package peft.*(\n|.)*demerge\[lora\]"):
        check_output(base, data, [SPAN], FAST, tmp_path)


def test_shared_modules_cost_no_memory_and_keep_what_trains() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    module[0].bias.requires_grad_(True)
    other = share_weights(module)
    assert other[0].weight.data_ptr() == module[0].weight.data_ptr()
    assert other[0].bias.data_ptr() != module[0].bias.data_ptr() and other[0].bias.requires_grad
    assert other[1].running_mean is module[1].running_mean
    half = share_weights(module, torch.bfloat16)
    assert half[1].running_mean.dtype == half[0].weight.dtype == torch.bfloat16
    assert half[1].num_batches_tracked.dtype == torch.long
