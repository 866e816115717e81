"""The training of one expert: its steps, log, checkpoints and weights.

run       base, data, span, options; `demerge.finetuning.step` computes a step
OUT/state/RANGE/step-N    checkpoints        OUT/state/RANGE/log.jsonl    losses by tenth of t
OUT/RANGE                 the finished expert, a stock pipeline with expert.json and log.jsonl

Observers add files of losses and previews, and feed trackers (`demerge.finetuning.train`).
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from demerge.data import ImageData
from demerge.diffusion.adapters import share_weights
from demerge.diffusion.encoded import Encoder
from demerge.diffusion.model import Diffusion, not_finite
from demerge.diffusion.projection import attach_to_blocks
from demerge.errors import NumericalError, Preempted, ResourceError, UsageError, listed
from demerge.expert import BASE, EXPERT, Expert
from demerge.finetuning.batches import Batch, Batches
from demerge.finetuning.checkpoint import newest_state, save_state
from demerge.finetuning.graph import CapturedStep
from demerge.finetuning.layers import freeze_others
from demerge.finetuning.lora import FILE, add_lora, part_name, write_lora
from demerge.finetuning.optimizers import averages_itself, make_optimizer, restore, state_of
from demerge.finetuning.options import FinetuneOptions
from demerge.finetuning.power_averages import PowerAverages, copy_snapshots
from demerge.finetuning.projection import attach, fold
from demerge.finetuning.step import Rates, Step
from demerge.finetuning.uncertainty import Uncertainty
from demerge.parallel import ALONE, World
from demerge.randomness import key_of
from demerge.statistics import commit_statistic, inputs_of, range_fisher
from demerge.storage.atomic import append_line, commit_dir, truncate
from demerge.storage.checkpoint import finite
from demerge.timesteps import TimestepRange

MAX_BAD_STEPS = 5


def record_name(base: Diffusion) -> str:
    """Return the name of the record: a model from a random start is a base and not an expert."""
    return EXPERT if base.folder is not None else BASE


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """One step of one expert.

    Attributes:
        loss: the objective. On a GPU it is that of the step before, so that no step is waited for.
        skipped: steps so far without a finite loss and gradient.
    """

    range: TimestepRange
    step: int
    total: int
    loss: float
    skipped: int


class Observer:
    """What watches a training, in the first process, and never changes it."""

    def logged(self, training: ExpertTraining, line: dict[str, Any]) -> None:
        """Take a line of the log, after it is written."""

    def stepped(self, training: ExpertTraining) -> None:
        """Take note of a step that was taken, before it is logged."""

    def finish(self, training: ExpertTraining, folder: Path) -> None:
        """Add files to the folder of the finished expert, before it is committed."""


class _Reading:
    """A loss that is copied to the host while the device goes on."""

    def __init__(self, step: int, loss: Tensor) -> None:
        self.step, self._value, self._event = step, loss, None
        if loss.device.type == "cuda":
            self._value = torch.empty((), pin_memory=True)
            self._value.copy_(loss, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(loss.device))

    def loss(self) -> float:
        """Return the loss, as soon as its step is done."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


@dataclass(frozen=True, slots=True)
class Job:
    """What the trainings of all ranges share.

    Attributes:
        inputs: what the records say of base, data and layers.
        layers: the layers that train; None is all.
        world: the processes that share each step; the first one writes.
        tell: called with a line if a run goes on in another way than it was asked to.
        encoders: give x_0 and text that were encoded before, one for each bucket of aspect ratios;
            none encode them at each step.
    """

    base: Diffusion
    data: ImageData
    options: FinetuneOptions
    inputs: dict[str, Any]
    layers: Sequence[str] | None = None
    world: World = ALONE
    tell: Callable[[str], None] | None = None
    observers: Sequence[Observer] = ()
    encoders: Sequence[Encoder] = ()


class ExpertTraining:
    """The training of one expert on a range, continued from the newest checkpoint."""

    def __init__(self, job: Job, span: TimestepRange, folder: Path) -> None:
        """Copy the base, attach the projection, and load the newest checkpoint.

        Args:
            folder: where checkpoints and log go until the expert is finished.
        """
        self.job, self.range, self.folder = job, span, folder
        self.base, self.options, self.world = job.base, job.options, job.world
        base, options = job.base, job.options
        self.denoiser = denoiser = self._trainable().train()
        self.has_dropout = any(
            isinstance(module, nn.Dropout) and module.p > 0 for module in denoiser.modules()
        )
        self.parameters: dict[str, Tensor] = {
            name: p for name, p in denoiser.named_parameters() if p.requires_grad
        }
        has_powers = options.ema_lengths and job.world.is_main
        self.powers = PowerAverages(self.parameters, options) if has_powers else None
        learned = Uncertainty(base) if options.loss_weight == "uncertainty" else None
        if learned is not None:
            self.parameters["uncertainty"] = learned.weight
        self.optimizer = make_optimizer(self.parameters, options)
        student, teacher = self._prepare(denoiser)
        self.one_step = Step(
            student, teacher, self.parameters, self.optimizer, options, job.world, learned
        )
        encoders = job.encoders
        self.batches = Batches(base, job.data, span, options, job.world, encoders=encoders)
        self.step, self.skipped, self._bad = 0, 0, 0
        self._captured: CapturedStep | None = None
        self._may_capture = self._allows_graph()
        self._unread: list[_Reading] = []
        self._saved_at = time.monotonic()
        self._resume()

    def _trainable(self) -> nn.Module:
        """Return the base's denoiser with what trains: its layers, a projection, or a LoRA."""
        base, options = self.base, self.options
        if options.lora_rank is not None:
            return add_lora(base.denoiser, options)
        denoiser = copy.deepcopy(base.denoiser)
        frozen = freeze_others(denoiser, self.job.layers)
        if options.projection == "foldable":
            attach(denoiser, frozen)
        elif options.projection == "paper":
            attach_to_blocks(denoiser)
        return denoiser

    def _prepare(self, denoiser: nn.Module) -> tuple[Diffusion, Diffusion]:
        """Return student and teacher as the options want them computed."""
        o, teacher = self.options, self.base
        if o.gradient_checkpointing:
            if not getattr(denoiser, "_supports_gradient_checkpointing", False):
                what = f"{type(denoiser).__name__} does not support gradient checkpointing"
                raise UsageError(what, fix="leave out --gradient-checkpointing")
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        torch.backends.cuda.matmul.allow_tf32 = o.allow_tf32
        if o.compile:
            teacher = self.base.with_denoiser(share_weights(self.base.denoiser))
            for module in (denoiser, teacher.denoiser):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                module.compile()
        if self.world.size == 1:
            return self.base.with_denoiser(denoiser), teacher
        devices = [self.base.device] if self.base.device.type == "cuda" else None
        parallel = DistributedDataParallel(denoiser, device_ids=devices)
        parallel.config = denoiser.config
        return self.base.with_denoiser(parallel), teacher

    # -- the steps ---------------------------------------------------------------------------------

    def train(self, stop: Callable[[], bool]) -> Iterator[TrainingStep]:
        """Take the remaining steps; save as the options say, and before stopping."""
        o, total = self.options, self.options.max_train_steps
        try:
            while self.step < total:
                loss = self.take_step()
                self.step += 1
                self._note_step()
                is_last = self.step == total
                is_stopping, is_due = self.world.any_of(stop(), self._is_due())
                saves = is_stopping or is_last or is_due or self.step % o.checkpointing_steps == 0
                if is_last or self.step % o.logging_steps == 0:
                    self._log()
                if saves:
                    loss = self.read_losses() if self._unread else loss
                    self.save_checkpoint()
                yield TrainingStep(self.range, self.step, total, loss, self.skipped)
                if is_stopping and not is_last:
                    what = f"stopped at step {self.step} of {self.range}"
                    raise Preempted(what, fix="run the same command to continue")
        finally:
            self.batches.close()

    def take_step(self) -> float:
        """Update the parameters and their averages once; return the newest loss that is known.

        Raises:
            NumericalError: if five steps in a row had no finite loss and gradient.
            ResourceError: if a single sample does not fit the memory.
        """
        batches, rates = self.batches.step(self.step), self.one_step.rates(self.step)
        cuda = [self.base.device] if self.base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda) if self.has_dropout else nullcontext():
            loss = self._compute(batches, rates)
        self._unread.append(_Reading(self.step, loss))
        return self.read_losses(but=1 if self.one_step.is_async else 0)

    def _compute(self, batches: list[Batch], rates: Rates) -> Tensor:
        """Take the step, captured if possible, in smaller pieces if the memory is too small."""
        while True:
            try:
                if self._may_capture and self._captured is None:
                    self._captured = self._capture(batches, rates)
                self._seed_dropout()  # after the capture, which draws too
                return (self._captured or self.one_step)(batches, rates)
            except torch.OutOfMemoryError as error:
                self._captured = None
                self._halve(error)

    def _capture(self, batches: list[Batch], rates: Rates) -> CapturedStep | None:
        """Capture the step; None if a module cannot be captured, which is said once."""
        try:
            return CapturedStep(self.one_step, batches, rates)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = f"the step cannot be captured as a CUDA graph: {str(error).splitlines()[0]}"
            if self.options.cuda_graph == "on":
                raise UsageError(reason, fix="give --cuda-graph off") from error
            self._may_capture = False
            self.say(reason)
            return None

    def _halve(self, error: Exception) -> None:
        """Compute each batch in twice as many pieces, and say so."""
        B, step = self.options.train_batch_size, self.one_step
        is_shared = self.world.size > 1
        if step.parts >= B or is_shared:
            fix = "give a smaller --train-batch-size, or --gradient-checkpointing"
            what = f"range {self.range}: {-(-B // step.parts)} images do not fit the memory"
            raise ResourceError(what, fix=fix) from error
        step.parts *= 2
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = -(-B // step.parts)
        self.say(f"out of memory: batches of {size} are accumulated; the batch of a step stays")

    def _note_step(self) -> None:
        """Update the power averages, and let the observers see the step."""
        if self.powers is not None:
            self.powers.update(self.step, self.folder)
        if self.world.is_main:
            for observer in self.job.observers:
                observer.stepped(self)

    def read_losses(self, but: int = 0) -> float:
        """Read the losses that were not read yet, but the newest ones; return the last.

        Raises:
            NumericalError: if five steps in a row had no finite loss and gradient.
        """
        loss = math.nan
        while len(self._unread) > but:
            reading = self._unread.pop(0)
            loss = reading.loss()
            self._bad = 0 if math.isfinite(loss) else self._bad + 1
            self.skipped += not math.isfinite(loss)
            if self._bad >= MAX_BAD_STEPS:
                raise NumericalError(
                    f"range {self.range}: {self._bad} steps in a row without a finite loss and"
                    f" gradient, at step {reading.step}",
                    fix=f"lower --learning-rate ({self.options.learning_rate:g}), check the images",
                )
        return loss

    def _is_due(self) -> bool:
        """Whether the time of `save_every` is over."""
        every = self.options.save_every
        return every is not None and time.monotonic() - self._saved_at >= every

    def _allows_graph(self) -> bool:
        """Whether the step may be captured; say why not if that was asked for."""
        o, reason = self.options, None
        if o.cuda_graph == "off":
            return False
        if self.base.device.type != "cuda":
            reason = f"the device is {self.base.device.type}"
        elif self.world.size > 1:
            reason = "several processes share the step"
        elif o.optimizer != "adamw":
            reason = f"optimizer {o.optimizer} waits for the host"
        elif o.aspect_ratio_buckets is not None:
            reason = "images have several sizes"
        elif o.compile:
            reason = "torch.compile is on"
        if reason is not None and o.cuda_graph == "on":
            what = f"--cuda-graph on, and {reason}"
            raise UsageError(what, fix="give --cuda-graph auto")
        return reason is None

    def _seed_dropout(self) -> None:
        """Make dropout a function of (seed, step, process), so that it survives a resume."""
        if self.has_dropout:
            key = (self.options.seed, "dropout", self.step, self.world.rank)
            torch.manual_seed(key_of(*key) % 2**63)

    def say(self, text: str) -> None:
        """Tell the person a line, from the first process."""
        if self.job.tell is not None and self.world.is_main:
            self.job.tell(text)

    # -- what it writes ----------------------------------------------------------------------------

    def _log(self) -> None:
        loss, by_bin = self.one_step.take_log()
        if not self.world.is_main:
            return
        line = {
            "step": self.step,
            "loss": _rounded(loss),
            "loss_by_bin": [_rounded(mean) for mean in by_bin],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        append_line(self.folder / "log.jsonl", json.dumps(line))
        for observer in self.job.observers:
            observer.logged(self, line)

    def save_checkpoint(self) -> None:
        """Commit a checkpoint, by the first of several processes.

        Raises:
            NumericalError: if weights or their averages hold NaN or Inf; the last one stays.
        """
        self._saved_at = time.monotonic()
        own = self.one_step.state() | (self.powers.means if self.powers else {})
        self._check_finite("weights", self.parameters)
        self._check_finite("averaged weights", self.one_step.ema)
        if not self.world.is_main:
            return
        log = self.folder / "log.jsonl"
        moments, values = state_of(self.optimizer, self.parameters)
        tensors = {f"model.{name}": value for name, value in self.parameters.items()}
        record = {
            "step": self.step,
            "skipped": self.skipped,
            "parts": self.one_step.parts,
            "log_bytes": log.stat().st_size if log.exists() else 0,
            "optimizer": values.model_dump(),
            "options": self.options.document(),
            "inputs": self.job.inputs,
        }
        limit = self.options.checkpoints_total_limit
        save_state(self.folder, tensors | own | moments, record, limit)

    def _check_finite(self, what: str, tensors: dict[str, Tensor]) -> None:
        bad = [name for name, tensor in tensors.items() if not finite(tensor.detach())]
        if bad:
            step = f"at step {self.step}, first in {bad[0]}"
            rate = f"lower --learning-rate ({self.options.learning_rate:g})"
            raise NumericalError(
                f"range {self.range}: the {what} hold NaN or Inf {step}",
                fix=f"remove {self.folder} and {rate}",
            )

    @torch.no_grad()
    def _resume(self) -> None:
        snapshot = newest_state(self.folder)
        log = self.folder / "log.jsonl"
        if snapshot is None:
            if self.world.is_main:
                log.unlink(missing_ok=True)
            return
        if self.options.resume_from_checkpoint == "never":
            what = f"{snapshot.path} exists, and --resume-from-checkpoint is never"
            raise UsageError(what, fix="leave the option out to continue, or give another folder")
        tensors = snapshot.tensors()
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
        self.one_step.restore(tensors)
        if self.powers is not None:
            self.powers.restore(tensors)
        restore(self.optimizer, self.parameters, tensors, snapshot.record.optimizer)
        self.step, self.skipped = snapshot.record.step, snapshot.record.skipped
        self.one_step.parts = snapshot.record.parts
        if self.world.is_main and log.exists():
            truncate(log, min(log.stat().st_size, snapshot.record.log_bytes))

    def finish(self, path: Path) -> None:
        """Write the expert as a pipeline or a LoRA, its `expert.json` and its log, whole or absent.

        It is a stock pipeline, unless the W of `--projection paper` are kept in it.
        """
        if not self.world.is_main:
            return
        with commit_dir(path) as temporary:
            self._save_weights(temporary)
            if (log := self.folder / "log.jsonl").exists():
                shutil.copyfile(log, temporary / log.name)
            copy_snapshots(self.folder, temporary)
            for observer in self.job.observers:
                observer.finish(self, temporary)
            record = Expert(
                range=(self.range.start, self.range.stop),
                base_sha256=self.job.inputs["base_sha256"],
                steps=self.step,
                skipped_steps=self.skipped,
                train_layers=None if self.job.layers is None else tuple(self.job.layers),
                inputs=self.job.inputs,
                options=self.options.document(),
            )
            record.save(temporary / record_name(self.base))
        shutil.rmtree(self.folder, ignore_errors=True)

    def _save_weights(self, folder: Path) -> None:
        """Write the averages of the weights.

        Raises:
            NumericalError: if one is NaN or Inf in the dtype of the files.
        """
        name = self.options.save_dtype
        dtype = getattr(torch, name)
        if self.options.lora_rank is not None:
            means = self.averages()
            factors = {key: means[key].to(dtype) for key in means if key != "uncertainty"}
            bad = [key for key, factor in factors.items() if not finite(factor)]
            self._check_saved(name, listed(bad))
            record = self.options.document()
            write_lora(folder / FILE, factors, record, part_name(self.base))
            return
        expert = self.base.with_denoiser(self.averaged_denoiser())
        nn.Module.to(expert.denoiser, dtype=dtype)
        self._check_saved(name, not_finite(expert.denoiser))
        expert.save(folder, keeps_projection=True)
        if self.options.fisher_samples:
            self._add_fisher(folder, expert)

    def _check_saved(self, dtype: str, bad: str) -> None:
        if bad:
            fix = "run the same command with --save-dtype float32, or lower --learning-rate"
            what = f"range {self.range}: as {dtype} the expert holds NaN or Inf in {bad}"
            raise NumericalError(what, fix=fix)

    def _add_fisher(self, folder: Path, expert: Diffusion) -> None:
        """Write the Fisher of the expert's range, as `demerge stats` does for the saved weights."""
        nn.Module.to(expert.denoiser, dtype=torch.float32)
        samples, seed = self.options.fisher_samples, self.options.seed
        fisher = range_fisher(expert, self.job.data, self.range, samples=samples, seed=seed)
        inputs = inputs_of(expert.sha256, self.job.data, self.range)
        commit_statistic(folder, "fisher", fisher, inputs, {"samples": samples, "seed": seed})

    @torch.no_grad()
    def averages(self) -> dict[str, Tensor]:
        """Return the averages of what trains, by the names of the parameters."""
        if not averages_itself(self.optimizer):
            return self.one_step.ema
        self.optimizer.eval()  # type: ignore[attr-defined]
        means = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer.train()  # type: ignore[attr-defined]
        return means

    @torch.no_grad()
    def averaged_denoiser(self) -> nn.Module:
        """Return the averaged weights in eval mode: in a stock module, or as factors of a LoRA.

        A stock module has the kept W, if any. One with a LoRA shares the base's tensors.
        """
        means, averaged = self.averages(), share_weights(self.denoiser)
        for name, parameter in averaged.named_parameters():
            if name in means:
                parameter.copy_(means[name])
        if self.options.lora_rank is not None:
            return averaged.eval().requires_grad_(False)
        expert = copy.deepcopy(self.base.denoiser)
        if self.options.projection == "paper":
            attach_to_blocks(expert)
        return fold(averaged, expert).eval().requires_grad_(False)


def _rounded(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
