"""One step: what it computes does not depend on how it is computed, and its state is all there is."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.errors import NumericalError, Preempted, ResourceError, UsageError
from demerge.finetuning import FinetuneOptions, finetune
from demerge.finetuning.batches import Batches
from demerge.finetuning.checkpoint import newest_state
from demerge.finetuning.optimizers import PACKAGES
from demerge.finetuning.step import FIRST_SCALE, GROWTH_STEPS, Step
from demerge.finetuning.trainer import ExpertTraining, Job
from demerge.timesteps import TimestepRange

SPAN = TimestepRange(0, 500)
FAST = FinetuneOptions(
    max_train_steps=4,
    train_batch_size=4,
    checkpointing_steps=2,
    logging_steps=3,
    learning_rate=1e-3,
    adam_epsilon=1e-3,  # steps in proportion to gradients, so that rounding stays rounding
    projection="none",
)
GPU = pytest.mark.gpu


@pytest.fixture
def base(tiny: Path) -> Diffusion:
    return Diffusion.load(tiny)


def train(
    base: Diffusion, data: ImageData, out: Path, options: FinetuneOptions, stop_at: int = 0
) -> str:
    """Train an expert, stopped once after `stop_at` steps; return its hash."""
    steps = itertools.count(1)
    for _ in finetune(base, data, [SPAN], options, out, stop=lambda: next(steps) == stop_at):
        pass
    return Diffusion.load(out / str(SPAN)).sha256


def after(job: Job, folder: Path, steps: int = 1) -> dict[str, Tensor]:
    """Return the parameters after some steps."""
    training = ExpertTraining(job, SPAN, folder)
    for _ in range(steps):
        training.take_step()
        training.step += 1
    return {name: p.detach().clone() for name, p in training.parameters.items()}


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], atol: float = 1e-5) -> None:
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=atol)


RESUMED: dict[str, dict[str, Any]] = {
    "accumulated": {"gradient_accumulation_steps": 2},
    "fp16": {"mixed_precision": "fp16"},
    "bf16, projected": {"mixed_precision": "bf16", "projection": "foldable"},
    "uncertainty": {"loss_weight": "uncertainty"},
    "antithetic": {"antithetic": True},
    "checkpointed": {"gradient_checkpointing": True},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedule-free": {"optimizer": "schedule-free", "use_ema": False},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_in_the_same_bytes(
    base: Diffusion, data: ImageData, tmp_path: Path, name: str
) -> None:
    options = replace(FAST, **RESUMED[name])
    if options.optimizer in PACKAGES:
        pytest.importorskip(PACKAGES[options.optimizer])
    whole = train(base, data, tmp_path / "whole", options)
    with pytest.raises(Preempted):
        train(base, data, tmp_path / "cut", options, stop_at=3)
    assert train(base, data, tmp_path / "cut", options) == whole != base.sha256


def test_checkpointed_activations_change_nothing(
    base: Diffusion, data: ImageData, tmp_path: Path
) -> None:
    job = Job(base, data, FAST, {})
    checkpointed = replace(job, options=replace(FAST, gradient_checkpointing=True))
    assert_close(after(job, tmp_path / "a"), after(checkpointed, tmp_path / "b"))


def test_a_batch_that_does_not_fit_is_halved_and_the_step_stays(
    base: Diffusion, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, lines = Job(base, data, FAST, {}), list[str]()
    whole = after(job, tmp_path / "whole")
    losses = Step._losses

    def limited(self: Step, batch: Any, rates: Any) -> Any:
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(self, batch, rates)

    monkeypatch.setattr(Step, "_losses", limited)
    training = ExpertTraining(replace(job, tell=lines.append), SPAN, tmp_path / "halved")
    loss = training.take_step()
    assert math.isfinite(loss)
    assert_close(whole, dict(training.parameters))
    assert training.one_step.counts.sum() == 4  # no error is counted twice
    assert [line.split(";")[0] for line in lines] == [
        "out of memory: batches of 2 are accumulated",
        "out of memory: batches of 1 are accumulated",
    ]
    training.step += 1
    training.save_checkpoint()
    state = newest_state(tmp_path / "halved")
    assert state is not None and state.record.parts == 4
    assert ExpertTraining(job, SPAN, tmp_path / "halved").one_step.parts == 4


def test_one_image_that_does_not_fit_is_a_resource_error(
    base: Diffusion, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Step, "_losses", full)
    with pytest.raises(ResourceError, match="1 images do not fit the memory") as caught:
        ExpertTraining(Job(base, data, FAST, {}), SPAN, tmp_path).take_step()
    assert "--gradient-checkpointing" in str(caught.value.fix)


def test_a_step_that_is_not_finite_changes_nothing_but_the_scale(
    base: Diffusion, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(FAST, mixed_precision="fp16")
    training = ExpertTraining(Job(base, data, options, {}), SPAN, tmp_path)
    before = {name: p.detach().clone() for name, p in training.parameters.items()}
    losses = Step._losses
    with monkeypatch.context() as broken:
        broken.setattr(Step, "_losses", lambda *a: tuple(v * math.inf for v in losses(*a)))
        assert math.isnan(training.take_step())
    assert training.skipped == 1
    assert all(torch.equal(before[name], p) for name, p in training.parameters.items())
    assert all(torch.equal(before[name], p) for name, p in training.one_step.ema.items())
    assert training.one_step.scale == FIRST_SCALE / 2
    assert training.one_step.counts.sum() == 0
    training.one_step.finite_steps.fill_(GROWTH_STEPS - 1)
    assert math.isfinite(training.take_step())
    assert training.one_step.scale == FIRST_SCALE


def test_fp16_takes_the_step_of_float32(base: Diffusion, data: ImageData, tmp_path: Path) -> None:
    """Up to the rounding of the passes: the scale of the loss cancels."""
    job = Job(base, data, replace(FAST, learning_rate=1e-4), {})
    half = replace(job, options=replace(job.options, mixed_precision="fp16"))
    first, second = after(job, tmp_path / "a"), after(half, tmp_path / "b")
    start = dict(base.denoiser.named_parameters())
    moved = torch.cat([(first[n] - start[n]).flatten() for n in first])
    other = torch.cat([(second[n] - start[n]).flatten() for n in first])
    assert torch.nn.functional.cosine_similarity(moved, other, dim=0) > 0.95


def test_a_held_step_changes_nothing(base: Diffusion, data: ImageData, tmp_path: Path) -> None:
    training = ExpertTraining(Job(base, data, FAST, {}), SPAN, tmp_path)
    before = {name: p.detach().clone() for name, p in training.parameters.items()}
    training.one_step.hold.fill_(1)
    assert math.isfinite(training.take_step())
    assert all(torch.equal(before[name], p) for name, p in training.parameters.items())
    assert training.one_step.counts.sum() == 0


def test_antithetic_samples_come_in_pairs(base: Diffusion, data: ImageData) -> None:
    [batch] = Batches(base, data, SPAN, replace(FAST, antithetic=True)).step(0)
    assert torch.equal(batch.noise[::2], -batch.noise[1::2])
    assert torch.equal(batch.t[::2], batch.t[1::2])
    assert torch.equal(batch.x0[::2], batch.x0[1::2])
    assert not torch.equal(batch.x0[0], batch.x0[2])
    with pytest.raises(UsageError, match="train_batch_size is 3"):
        replace(FAST, antithetic=True, train_batch_size=3)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
def test_a_process_draws_what_a_thread_draws(base: Diffusion, data: ImageData) -> None:
    options = replace(FAST, random_flip=True, gradient_accumulation_steps=2)
    thread, process = (Batches(base, data, SPAN, options, by_process=p) for p in (False, True))
    for step in (0, 1, 3, 2, 3):  # in order, and after a jump
        for mine, theirs in zip(thread.step(step), process.step(step), strict=True):
            pairs = zip(mine.tensors(), theirs.tensors(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    thread.close()
    process.close()
    assert not multiprocessing.active_children()


def test_uncertainty_learns_the_error_of_each_timestep(
    base: Diffusion, data: ImageData, tmp_path: Path
) -> None:
    options = replace(FAST, loss_weight="uncertainty", learning_rate=1e-2, consistency=0.0)
    training = ExpertTraining(Job(base, data, options, {}), SPAN, tmp_path)
    first = training.take_step()
    for training.step in range(1, 30):
        last = training.take_step()
    assert last < first
    assert float(training.parameters["uncertainty"].abs().max()) > 0
    assert "uncertainty" not in dict(training.averaged_denoiser().named_parameters())


def test_old_checkpoints_are_deleted_after_the_new_one(
    base: Diffusion, data: ImageData, tmp_path: Path
) -> None:
    options = replace(FAST, checkpointing_steps=1, checkpoints_total_limit=2)
    with pytest.raises(Preempted):
        train(base, data, tmp_path, options, stop_at=3)
    state = tmp_path / "state" / str(SPAN)
    assert sorted(p.name for p in state.glob("step-*")) == ["step-00000002", "step-00000003"]
    with pytest.raises(UsageError, match="--resume-from-checkpoint is never"):
        train(base, data, tmp_path, replace(options, resume_from_checkpoint="never"))


def test_time_too_makes_a_checkpoint(
    base: Diffusion, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(FAST, checkpointing_steps=100, save_every=60.0)
    now = 0.0

    def monotonic() -> float:
        nonlocal now
        now += 25
        return now

    monkeypatch.setattr("demerge.finetuning.trainer.time.monotonic", monotonic)
    saved: list[int] = []
    save = ExpertTraining.save_checkpoint

    def spy(self: ExpertTraining) -> None:
        saved.append(self.step)
        save(self)

    monkeypatch.setattr(ExpertTraining, "save_checkpoint", spy)
    train(base, data, tmp_path, options)
    assert saved == [3, 4]


def test_a_missing_optimizer_is_one_line(
    base: Diffusion, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, "prodigy", "no_such_package")
    with pytest.raises(UsageError, match="needs the package no_such_package") as caught:
        train(base, data, tmp_path, replace(FAST, optimizer="prodigy"))
    assert "pip install no_such_package" in str(caught.value.fix)


def test_a_graph_is_refused_where_it_cannot_be(
    base: Diffusion, data: ImageData, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--cuda-graph on, and the device is cpu"):
        train(base, data, tmp_path, replace(FAST, cuda_graph="on"))


def test_two_processes_do_not_train_one_range(
    base: Diffusion, data: ImageData, tmp_path: Path
) -> None:
    first = finetune(base, data, [SPAN], FAST, tmp_path)
    next(first)
    with pytest.raises(UsageError, match=r"another process \(pid \d+ on "):
        train(base, data, tmp_path, FAST)
    first.close()
    train(base, data, tmp_path, FAST)


# -- on a GPU --------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_captured_step_equals_the_eager_one(
    tiny: Path, data: ImageData, tmp_path: Path, precision: str
) -> None:
    base = Diffusion.load(tiny, device="cuda")
    eager = replace(FAST, cuda_graph="off", mixed_precision=precision)
    job = Job(base, data, eager, {})
    captured = replace(job, options=replace(eager, cuda_graph="on"))
    assert_close(after(job, tmp_path / "a", 3), after(captured, tmp_path / "b", 3), atol=1e-4)


@GPU
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_captured_run_resumes_to_the_same_bytes(
    make_tiny: Callable[..., Path], data: ImageData, tmp_path: Path, precision: str
) -> None:
    base = Diffusion.load(make_tiny(dropout=0.1), device="cuda")
    options = replace(FAST, cuda_graph="on", mixed_precision=precision)
    whole = train(base, data, tmp_path / "whole", options)
    with pytest.raises(Preempted):
        train(base, data, tmp_path / "cut", options, stop_at=2)
    assert train(base, data, tmp_path / "cut", options) == whole


@GPU
def test_a_bad_captured_step_is_skipped_and_read_later(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    base = Diffusion.load(tiny, device="cuda")
    training = ExpertTraining(Job(base, data, replace(FAST, cuda_graph="on"), {}), SPAN, tmp_path)
    training.take_step()
    before = {name: p.detach().clone() for name, p in training.parameters.items()}
    training.one_step.weights.fill_(math.inf)
    for training.step in range(1, 6):
        training.take_step()
    assert all(torch.equal(before[name], p) for name, p in training.parameters.items())
    with pytest.raises(NumericalError, match="5 steps in a row"):
        training.read_losses()
