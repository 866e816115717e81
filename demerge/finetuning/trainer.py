"""The training of one expert: the state that changes, the step, its checkpoints, and the result.

EMA: theta_bar <- d theta_bar + (1 - d) theta, d = min(decay, 1 - (1 + step)^(-3/4)) (diffusers'
EMAModel with power 3/4). The expert holds theta_bar, folded.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demerge.data import ImageData
from demerge.diffusion.model import Diffusion, not_finite, squared_error
from demerge.errors import NumericalError, Preempted
from demerge.expert import BASE, EXPERT, Expert
from demerge.finetuning import objective
from demerge.finetuning.checkpoint import (
    newest_state,
    optimizer_tensors,
    restore_optimizer,
    save_state,
)
from demerge.finetuning.layers import freeze_others
from demerge.finetuning.options import FinetuneOptions
from demerge.finetuning.projection import attach, fold
from demerge.randomness import key_of, normal, permutation, uniform
from demerge.statistics import commit_statistic, inputs_of, range_fisher
from demerge.storage.atomic import append_line, commit_dir, truncate
from demerge.storage.checkpoint import finite
from demerge.timesteps import TimestepRange

LOG_BINS = 10
MAX_BAD_STEPS = 5


def record_name(base: Diffusion) -> str:
    """Return the name of the record: a model from a random start is a base and not an expert."""
    return EXPERT if base.folder is not None else BASE


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """One step of one expert.

    Attributes:
        loss: the objective.
        skipped: steps so far without a finite loss and gradient.
    """

    range: TimestepRange
    step: int
    total: int
    loss: float
    skipped: int


class ExpertTraining:
    """The training of one expert on a range, continued from the newest checkpoint."""

    def __init__(
        self,
        base: Diffusion,
        data: ImageData,
        span: TimestepRange,
        options: FinetuneOptions,
        folder: Path,
        inputs: dict[str, Any],
        layers: Sequence[str] | None = None,
    ) -> None:
        """Copy the base and attach the projection.

        Args:
            folder: where checkpoints and log go until the expert is finished.
            inputs: what the records say of base, data and layers.
            layers: the layers that train; None is all.
        """
        self.base, self.data, self.range, self.options = base, data, span, options
        self.folder, self.inputs, self.layers = folder, inputs, layers
        denoiser = copy.deepcopy(base.denoiser).train()
        frozen = freeze_others(denoiser, layers)
        if options.projection == "foldable":
            attach(denoiser, frozen)
        self.student = base.with_denoiser(denoiser)
        self.parameters: dict[str, Tensor] = {
            name: p for name, p in denoiser.named_parameters() if p.requires_grad
        }
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = _optimizer(self.parameters, options)
        self.weights = objective.loss_weights(base, options)
        self.step, self.skipped = 0, 0
        self.window: list[tuple[Tensor, Tensor]] = []  # t and error since the last line of the log
        self._orders: dict[int, list[int]] = {}
        self._resume()

    # -- the step ----------------------------------------------------------------------------------

    def train(self, stop: Callable[[], bool]) -> Iterator[TrainingStep]:
        """Take the remaining steps; save every `checkpointing_steps` and before stopping."""
        bad, total = 0, self.options.max_train_steps
        while self.step < total:
            loss = self.take_step()
            bad = 0 if math.isfinite(loss) else bad + 1
            if bad >= MAX_BAD_STEPS:
                raise NumericalError(
                    f"range {self.range}: {bad} steps in a row without a finite loss and gradient, "
                    f"at step {self.step}",
                    fix=f"lower --learning-rate ({self.options.learning_rate:g}), check the images",
                )
            self.step += 1
            is_last = self.step == total
            if is_last or self.step % self.options.logging_steps == 0:
                self._log()
            stopping = stop()
            if stopping or is_last or self.step % self.options.checkpointing_steps == 0:
                self.save_checkpoint()
            yield TrainingStep(self.range, self.step, total, loss, self.skipped)
            if stopping and not is_last:
                what = f"stopped at step {self.step} of {self.range}"
                raise Preempted(what, fix="run the same command to continue")

    def take_step(self) -> float:
        """Update the parameters and their averages once; return the loss, NaN if it was skipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = objective.learning_rate(self.options, self.step)
        total = 0.0
        for micro in range(self.options.gradient_accumulation_steps):
            loss = self._loss(micro) / self.options.gradient_accumulation_steps
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.options.max_grad_norm)
        if math.isfinite(total) and bool(torch.isfinite(norm)):
            self.optimizer.step()
            self._average()
        else:
            self.skipped += 1
            total = math.nan
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _loss(self, micro: int) -> Tensor:
        o, B = self.options, self.options.train_batch_size
        samples = list(range(micro * B, (micro + 1) * B))
        x0, condition = self._batch(samples)
        t = objective.draw_timesteps(self.range, self.base.T, o, self.step, samples).to(x0.device)
        noise = normal(x0.shape[1:], o.seed, "noise", samples=samples, step=self.step).to(x0.device)
        x_t, y = self.base.add_noise(x0, noise, t), self.base.target(x0, noise, t)
        bf16 = torch.autocast(x0.device.type, torch.bfloat16, enabled=o.mixed_precision == "bf16")
        with self._dropout(micro), bf16:
            prediction = self.student.predict(x_t, t, condition)
            error = squared_error(prediction, y)
            loss = self.weights[t.cpu()].to(error) * error
            lam = objective.consistency_weight(o, self.step)
            if lam > 0:
                with torch.no_grad():
                    teacher = self.base.predict(x_t, t, condition)
                loss = loss + lam * squared_error(prediction, teacher)
        self.window.append((t.cpu(), error.detach().cpu()))
        return loss.mean()

    @contextmanager
    def _dropout(self, micro: int) -> Iterator[None]:
        """Make dropout a function of (seed, step), so that it survives a resume."""
        cuda = [self.base.device] if self.base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(key_of(self.options.seed, "dropout", self.step, micro) % 2**63)
            yield

    def _batch(self, samples: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        n, o = len(self.data), self.options

        def draw(purpose: str) -> Tensor:
            return uniform(o.seed, purpose, samples=samples, step=self.step)

        first = self.step * o.train_batch_size * o.gradient_accumulation_steps
        indices = [self._order((first + s) // n)[(first + s) % n] for s in samples]
        flips = (draw("flip") < 0.5).tolist() if o.random_flip else None
        images = self.data.floats(indices, flips)
        captions, labels = self.data.annotations(indices)
        if captions is not None and self.base.requires_text:
            keep = (draw("caption") >= o.caption_dropout).tolist()
            captions = [text if kept else "" for text, kept in zip(captions, keep, strict=True)]
        x0, condition = self.base.encode(images, captions, labels)
        if condition is not None and self.base.classes is not None:
            condition = self.base.classes.drop(condition, draw("label"))
        return x0, condition

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            self._orders.pop(epoch - 2, None)
            self._orders[epoch] = permutation(len(self.data), self.options.seed, "order", epoch)
        return self._orders[epoch]

    @torch.no_grad()
    def _average(self) -> None:
        decay = 0.0
        if self.options.use_ema:
            decay = min(self.options.ema_decay, 1 - (1 + self.step) ** -0.75)
        means, values = list(self.ema.values()), [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(means, values, 1 - decay)

    # -- what it writes ----------------------------------------------------------------------------

    def _log(self) -> None:
        t, error = (torch.cat(parts) for parts in zip(*self.window, strict=True))
        bins = (t * LOG_BINS // self.base.T).long()
        sums = torch.zeros(LOG_BINS).index_add_(0, bins, error.float())
        means = sums.double() / torch.bincount(bins, minlength=LOG_BINS)
        line = {
            "step": self.step,
            "loss": _rounded(float(error.float().nanmean())),
            "loss_by_bin": [_rounded(mean) for mean in means.tolist()],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        append_line(self.folder / "log.jsonl", json.dumps(line))
        self.window.clear()

    def save_checkpoint(self) -> None:
        """Commit a checkpoint.

        Raises:
            NumericalError: if weights or their averages hold NaN or Inf; the last one stays.
        """
        self._check_finite("weights", self.parameters)
        self._check_finite("averaged weights", self.ema)
        log = self.folder / "log.jsonl"
        tensors = {f"model.{name}": value for name, value in self.parameters.items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
        names = {id(p): name for name, p in self.parameters.items()}
        tensors |= optimizer_tensors(self.optimizer, names)
        if self.window:
            t, error = zip(*self.window, strict=True)
            tensors |= {"window.t": torch.cat(t), "window.error": torch.cat(error)}
        record = {
            "step": self.step,
            "skipped": self.skipped,
            "log_bytes": log.stat().st_size if log.exists() else 0,
            "options": self.options.document(),
            "inputs": self.inputs,
        }
        save_state(self.folder, tensors, record)

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
            log.unlink(missing_ok=True)
            return
        tensors = snapshot.tensors()
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
            self.ema[name].copy_(tensors[f"ema.{name}"])
        restore_optimizer(self.optimizer, self.parameters, tensors)
        self.step, self.skipped = snapshot.record.step, snapshot.record.skipped
        if "window.t" in tensors:
            self.window = [(tensors["window.t"], tensors["window.error"])]
        if log.exists():
            truncate(log, min(log.stat().st_size, snapshot.record.log_bytes))

    def finish(self, path: Path) -> None:
        """Write the expert as a stock pipeline with `expert.json` and its log, whole or absent."""
        dtype = self.options.save_dtype
        with commit_dir(path) as temporary:
            expert = self.base.with_denoiser(self.averaged_denoiser())
            nn.Module.to(expert.denoiser, dtype=getattr(torch, dtype))
            if bad := not_finite(expert.denoiser):
                fix = "run the same command with --save-dtype float32, or lower --learning-rate"
                what = f"range {self.range}: as {dtype} the expert holds NaN or Inf in {bad}"
                raise NumericalError(what, fix=fix)
            expert.save(temporary)
            if self.options.fisher_samples:
                self._add_fisher(temporary, expert)
            log = self.folder / "log.jsonl"
            if log.exists():
                shutil.copyfile(log, temporary / "log.jsonl")
            record = Expert(
                range=(self.range.start, self.range.stop),
                base_sha256=self.inputs["base_sha256"],
                steps=self.step,
                skipped_steps=self.skipped,
                train_layers=None if self.layers is None else tuple(self.layers),
                inputs=self.inputs,
                options=self.options.document(),
            )
            record.save(temporary / record_name(self.base))
        shutil.rmtree(self.folder, ignore_errors=True)

    def _add_fisher(self, folder: Path, expert: Diffusion) -> None:
        """Write the Fisher of the expert's range, as `demerge stats` does for the saved weights."""
        nn.Module.to(expert.denoiser, dtype=torch.float32)
        samples, seed = self.options.fisher_samples, self.options.seed
        fisher = range_fisher(expert, self.data, self.range, samples=samples, seed=seed)
        inputs = inputs_of(expert.sha256, self.data, self.range)
        commit_statistic(folder, "fisher", fisher, inputs, {"samples": samples, "seed": seed})

    @torch.no_grad()
    def averaged_denoiser(self) -> nn.Module:
        """Return the averaged weights in a stock module, in eval mode."""
        averaged = copy.deepcopy(self.student.denoiser)
        for name, parameter in averaged.named_parameters():
            if name in self.ema:
                parameter.copy_(self.ema[name])
        return fold(averaged, copy.deepcopy(self.base.denoiser)).eval().requires_grad_(False)


def _optimizer(parameters: dict[str, Tensor], options: FinetuneOptions) -> torch.optim.AdamW:
    mixes = [parameter for name, parameter in parameters.items() if name.endswith(".W")]
    others = [parameter for name, parameter in parameters.items() if not name.endswith(".W")]
    groups: list[dict[str, Any]] = [{"params": others}]
    if mixes:  # decay would pull W to 0 and not to I
        groups.append({"params": mixes, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        fused=True,
    )


def _rounded(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
