"""The training of one expert: the state that changes, the step, its checkpoints, and the folder it ends in.

EMA: theta_bar <- d theta_bar + (1 - d) theta, d = min(decay, 1 - (1 + step)^(-3/4)) (diffusers' EMAModel with power 3/4);
the expert holds theta_bar, folded.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demerge.data import ImageData
from demerge.diffusion.model import Diffusion, not_finite, squared_error
from demerge.errors import NumericalError, Preempted
from demerge.expert import BASE, EXPERT, Expert
from demerge.finetuning.checkpoint import (
    newest_state,
    optimizer_tensors,
    restore_optimizer,
    save_state,
)
from demerge.finetuning.layers import freeze_others
from demerge.finetuning.objective import (
    consistency_weight,
    draw_timesteps,
    learning_rate,
    loss_weights,
)
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
    """Return the name of the record of what is trained from `base`: of a random start, a base and not an expert."""
    return EXPERT if base.folder is not None else BASE


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of one expert; `loss` is the objective, `skipped` counts steps without a finite loss and gradient."""

    range: TimestepRange
    step: int
    total: int
    loss: float
    skipped: int


@dataclass
class Run:
    """The training of one expert: what changes from step to step, and what it needs to take one."""

    base: Diffusion
    student: Diffusion
    data: ImageData
    range: TimestepRange
    options: FinetuneOptions
    folder: Path
    inputs: dict[str, Any]
    parameters: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    weights: Tensor
    layers: Sequence[str] | None = None
    step: int = 0
    skipped: int = 0
    window: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    orders: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        base: Diffusion,
        data: ImageData,
        span: TimestepRange,
        options: FinetuneOptions,
        folder: Path,
        inputs: dict[str, Any],
        layers: Sequence[str] | None = None,
    ) -> Run:
        """Copy the base, attach the projection, and continue from the newest checkpoint where there is one."""
        denoiser = copy.deepcopy(base.denoiser).train()
        frozen = freeze_others(denoiser, layers)
        if options.projection == "foldable":
            attach(denoiser, frozen)
        parameters: dict[str, Tensor] = {
            name: p for name, p in denoiser.named_parameters() if p.requires_grad
        }
        mixes = [parameter for name, parameter in parameters.items() if name.endswith(".W")]
        others = [parameter for name, parameter in parameters.items() if not name.endswith(".W")]
        groups: list[dict[str, Any]] = [{"params": others}]
        if mixes:
            groups.append(
                {"params": mixes, "weight_decay": 0.0}
            )  # decay would pull W to 0 and not to I
        optimizer = torch.optim.AdamW(
            groups,
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.adam_weight_decay,
            eps=options.adam_epsilon,
            fused=True,
        )
        ema = {name: p.detach().clone() for name, p in parameters.items()}
        weights = loss_weights(base, options)
        student = base.with_denoiser(denoiser)
        run = cls(
            base,
            student,
            data,
            span,
            options,
            folder,
            inputs,
            parameters,
            ema,
            optimizer,
            weights,
            layers,
        )
        run._resume()
        return run

    # -- the step ----------------------------------------------------------------------------------------------------

    def train(self, stop: Callable[[], bool]) -> Iterator[Progress]:
        """Take the remaining steps; commit a checkpoint every `checkpointing_steps` and before stopping."""
        bad = 0
        while self.step < self.options.max_train_steps:
            loss = self._step()
            bad = 0 if math.isfinite(loss) else bad + 1
            if bad >= MAX_BAD_STEPS:
                raise NumericalError(
                    f"range {self.range}: {bad} steps in a row without a finite loss and gradient, at step {self.step}",
                    fix=f"lower --learning-rate ({self.options.learning_rate:g}) or check the images",
                )
            self.step += 1
            last = self.step == self.options.max_train_steps
            if last or self.step % self.options.logging_steps == 0:
                self._log()
            stopping = stop()
            if stopping or last or self.step % self.options.checkpointing_steps == 0:
                self._save()
            yield Progress(self.range, self.step, self.options.max_train_steps, loss, self.skipped)
            if stopping and not last:
                raise Preempted(
                    f"stopped at step {self.step} of {self.range}",
                    fix="run the same command to continue",
                )

    def _step(self) -> float:
        rate = learning_rate(self.options, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
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
        t = draw_timesteps(self.range, self.base.T, o, self.step, samples).to(x0.device)
        noise = normal(x0.shape[1:], o.seed, "noise", samples=samples, step=self.step).to(x0.device)
        x_t, y = self.base.add_noise(x0, noise, t), self.base.target(x0, noise, t)
        with (
            self._dropout(micro),
            torch.autocast(x0.device.type, torch.bfloat16, enabled=o.mixed_precision == "bf16"),
        ):
            prediction = self.student.predict(x_t, t, condition)
            error = squared_error(prediction, y)
            loss = self.weights[t.cpu()].to(error) * error
            lam = consistency_weight(o, self.step)
            if lam > 0:
                with torch.no_grad():
                    teacher = self.base.predict(x_t, t, condition)
                loss = loss + lam * squared_error(prediction, teacher)
        self.window.append((t.cpu(), error.detach().cpu()))
        return loss.mean()

    @contextmanager
    def _dropout(self, micro: int) -> Iterator[None]:
        """Give dropout a stream of its own, so that it too is a function of (seed, step) and survives a resume."""
        cuda = [self.base.device] if self.base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(key_of(self.options.seed, "dropout", self.step, micro) % 2**63)
            yield

    def _batch(self, samples: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        n, o = len(self.data), self.options
        first = self.step * o.train_batch_size * o.gradient_accumulation_steps
        indices = [self._order((first + s) // n)[(first + s) % n] for s in samples]
        flips = (
            (uniform(o.seed, "flip", samples=samples, step=self.step) < 0.5).tolist()
            if o.random_flip
            else None
        )
        images = self.data.floats(indices, flips)
        captions, labels = self.data.annotations(indices)
        if captions is not None and self.base.requires_text:
            kept = (
                uniform(o.seed, "caption", samples=samples, step=self.step) >= o.caption_dropout
            ).tolist()
            captions = [
                caption if keep else "" for caption, keep in zip(captions, kept, strict=True)
            ]
        x0, condition = self.base.encode(images, captions, labels)
        if condition is not None and self.base.classes is not None:
            condition = self.base.classes.dropped(
                condition, uniform(o.seed, "label", samples=samples, step=self.step)
            )
        return x0, condition

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self.orders:
            self.orders.pop(epoch - 2, None)
            self.orders[epoch] = permutation(len(self.data), self.options.seed, "order", epoch)
        return self.orders[epoch]

    @torch.no_grad()
    def _average(self) -> None:
        decay = (
            min(self.options.ema_decay, 1 - (1 + self.step) ** -0.75)
            if self.options.use_ema
            else 0.0
        )
        torch._foreach_lerp_(
            list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay
        )

    # -- what it leaves on disk --------------------------------------------------------------------------------------

    def _log(self) -> None:
        t, error = (torch.cat(parts) for parts in zip(*self.window, strict=True))
        bins = (t * LOG_BINS // self.base.T).long()
        sums, counts = (
            torch.zeros(LOG_BINS).index_add_(0, bins, error.float()),
            torch.bincount(bins, minlength=LOG_BINS),
        )
        by_bin = [
            round(float(s / c), 6) if c and math.isfinite(s) else None
            for s, c in zip(sums, counts, strict=True)
        ]
        mean = float(error.float().nanmean())
        line = {
            "step": self.step,
            "loss": round(mean, 6) if math.isfinite(mean) else None,
            "loss_by_bin": by_bin,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        append_line(self.folder / "log.jsonl", json.dumps(line))
        self.window.clear()

    def _save(self) -> None:
        """Commit a checkpoint.

        Raises:
            NumericalError: if weights or their averages hold NaN or Inf; the checkpoint before stays.
        """
        for what, tensors in (("weights", self.parameters), ("averaged weights", self.ema)):
            self._refuse(
                what, [name for name, tensor in tensors.items() if not finite(tensor.detach())]
            )
        log = self.folder / "log.jsonl"
        names = {id(p): name for name, p in self.parameters.items()}
        tensors = {f"model.{k}": v for k, v in self.parameters.items()} | {
            f"ema.{k}": v for k, v in self.ema.items()
        }
        record = {
            "step": self.step,
            "skipped": self.skipped,
            "log_bytes": log.stat().st_size if log.exists() else 0,
            "options": self.options.document(),
            "inputs": self.inputs,
        }
        tensors |= optimizer_tensors(self.optimizer, names)
        if self.window:
            t, error = zip(*self.window, strict=True)
            tensors |= {"window.t": torch.cat(t), "window.error": torch.cat(error)}
        save_state(self.folder, tensors, record)

    def _refuse(self, what: str, bad: Sequence[str]) -> None:
        if bad:
            raise NumericalError(
                f"range {self.range}: the {what} hold NaN or Inf at step {self.step}, first in {bad[0]}",
                fix=f"remove {self.folder} and lower --learning-rate ({self.options.learning_rate:g})",
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
        """Write the averaged, folded expert as a stock pipeline with `expert.json` and its log, whole or absent."""
        with commit_dir(path) as temporary:
            expert = self.base.with_denoiser(self.expert())
            nn.Module.to(expert.denoiser, dtype=getattr(torch, self.options.save_dtype))
            if bad := not_finite(expert.denoiser):
                raise NumericalError(
                    f"range {self.range}: as {self.options.save_dtype} the expert holds NaN or Inf in {bad}",
                    fix="run the same command with --save-dtype float32, or start again with a lower --learning-rate",
                )
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
        """Write the Fisher of the expert's range, as `demerge stats` would: of the weights as they are read back."""
        nn.Module.to(expert.denoiser, dtype=torch.float32)
        options = {"samples": self.options.fisher_samples, "seed": self.options.seed}
        found = range_fisher(
            expert, self.data, self.range, samples=options["samples"], seed=options["seed"]
        )
        commit_statistic(
            folder, "fisher", found, inputs_of(expert.sha256, self.data, self.range), options
        )

    def expert(self) -> nn.Module:
        """Return the averaged weights in a stock module, in eval mode."""
        averaged = copy.deepcopy(self.student.denoiser)
        parameters = dict(averaged.named_parameters())
        with torch.no_grad():
            for name, mean in self.ema.items():
                parameters[name].copy_(mean)
        return fold(averaged, copy.deepcopy(self.base.denoiser)).eval().requires_grad_(False)
