"""One optimizer step of an expert, computed on the device without waiting for it.

    loss_i = w(t_i) |y_i - f(x_i, t_i)|^2 + lambda |f_0(x_i, t_i) - f(x_i, t_i)|^2
    g      = grad of sum_i loss_i / n          n samples over all batches of the step
    theta  <- optimizer(theta, g min(1, c / |g|))
    mean   <- mean + (1 - decay) (theta - mean)

Whether loss and gradient are finite is decided on the device: on a GPU the optimizer's kernel is
told to do nothing (`found_inf`), the average gets weight 0, and the host reads the loss when the
next step is running. So no step waits, and the whole step can be captured as one CUDA graph
(`demerge.finetuning.graph`).

With fp16 the loss is multiplied by a scale, which is halved after a step that was not finite and
doubled after 2,000 that were (arXiv 1710.03740). Dividing by the scale and clipping are one
multiplication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from demerge.diffusion.model import Diffusion, squared_error
from demerge.diffusion.numerics import DTYPES
from demerge.finetuning import objective
from demerge.finetuning.batches import Batch
from demerge.finetuning.options import FinetuneOptions
from demerge.finetuning.uncertainty import Uncertainty
from demerge.parallel import ALONE, World

LOG_BINS = 10
FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000
Number = float | Tensor


@dataclass(frozen=True, slots=True)
class Rates:
    """The numbers that change from step to step: floats, or scalars on a GPU."""

    learning_rate: Number
    consistency: Number
    ema: Number


class Step:
    """The parameters of one expert, and what one step does to them.

    Attributes:
        parts: the pieces that each batch is cut into, so that it fits the memory.
        hold: if 1, a step computes all and changes nothing.
        sums, counts: of the errors by tenth of [0, T), since the last line of the log.
    """

    def __init__(
        self,
        student: Diffusion,
        teacher: Diffusion,
        parameters: Mapping[str, Tensor],
        optimizer: Optimizer,
        options: FinetuneOptions,
        world: World = ALONE,
        uncertainty: Uncertainty | None = None,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.parameters, self.optimizer = list(parameters.values()), optimizer
        self.ema = {name: p.detach().clone() for name, p in parameters.items()}
        self.options, self.world, self.uncertainty = options, world, uncertainty
        self.device, self.parts = student.device, 1
        self.is_async = self.device.type == "cuda" and options.optimizer == "adamw"
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.weights = objective.loss_weights(teacher, options).to(self.device, dtype)
        self.bins = torch.arange(LOG_BINS, device=self.device)
        self.sums = torch.zeros(LOG_BINS, dtype=dtype, device=self.device)
        self.counts = torch.zeros_like(self.sums)
        self.hold = torch.zeros((), device=self.device)
        scale = FIRST_SCALE if options.mixed_precision == "fp16" else 1.0
        self.scale = torch.tensor(scale, device=self.device)
        self.finite_steps = torch.zeros((), device=self.device)
        self._rates = [torch.zeros((), device=self.device) for _ in range(3)]

    def rates(self, step: int) -> Rates:
        """Return the rates of a step; on a GPU in the same tensors each time."""
        o = self.options
        decay = min(o.ema_decay, 1 - (1 + step) ** -0.75) if o.use_ema else 0.0
        values = (
            objective.learning_rate(o, step),
            objective.consistency_weight(o, step),
            1 - decay,
        )
        if not self.is_async:
            return Rates(*values)
        for tensor, value in zip(self._rates, values, strict=True):
            tensor.fill_(value)
        return Rates(*self._rates)

    def __call__(self, batches: Sequence[Batch], rates: Rates) -> Tensor:
        """Update the parameters and their average once.

        Returns:
            the loss, a scalar on the device; NaN if loss or gradient were not finite, and nothing
            but the log's sums was changed.
        """
        loss, errors = self.backward(batches, rates)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients) / self.scale
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        factor = (self.options.max_grad_norm / (norm + 1e-6)).clamp(max=1) / self.scale
        if self.is_async or float(factor) != 1:
            torch._foreach_mul_(gradients, factor)
        if self.options.mixed_precision == "fp16":
            self._rescale(finite)
        if self.is_async:
            self._update_on_device(finite, rates)
        elif bool(finite) and not bool(self.hold):
            self._update(rates)
        self.optimizer.zero_grad(set_to_none=True)
        self._note(torch.cat([batch.t for batch in batches]), errors)
        return torch.where(finite, loss, torch.nan)

    # -- forward and backward ----------------------------------------------------------------------

    def backward(self, batches: Sequence[Batch], rates: Rates) -> tuple[Tensor, Tensor]:
        """Add the gradients of the step's loss, times the scale.

        Returns:
            the loss, a scalar, and the error of each sample of this process.
        """
        samples = sum(map(len, batches))
        loss = torch.zeros((), device=self.device)
        pieces = [piece for batch in batches for piece in batch.chunk(self.parts)]
        errors = []
        for i, piece in enumerate(pieces):
            with self._synchronized(i == len(pieces) - 1):
                losses, error = self._losses(piece, rates)
                part = losses.sum() / samples
                (part * self.scale).backward()
            loss += part.detach()
            errors.append(error.detach())
        if self.world.size > 1:
            torch.distributed.all_reduce(loss)
            loss /= self.world.size
        return loss, torch.cat(errors)

    def _losses(self, batch: Batch, rates: Rates) -> tuple[Tensor, Tensor]:
        """Return the loss and the error of each sample, [B] and [B]."""
        base, t = self.teacher, batch.t
        x_t, y = base.add_noise(batch.x0, batch.noise, t), base.target(batch.x0, batch.noise, t)
        with self._autocast():
            prediction = self.student.predict(x_t, t, batch.condition)
            error = squared_error(prediction, y)
            losses = self.weights[t.long()].to(error) * error
            if self.uncertainty is not None:
                losses = self.uncertainty(losses, t)
            if self.options.consistency > 0 and (self.is_async or rates.consistency > 0):
                with torch.no_grad():
                    goal = base.predict(x_t, t, batch.condition)
                losses = losses + rates.consistency * squared_error(prediction, goal)
        return losses, error

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = DTYPES[self.options.mixed_precision]
        if dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype, cache_enabled=False)

    def _synchronized(self, is_last: bool) -> AbstractContextManager[Any]:
        """Let processes share gradients in the last backward pass only."""
        denoiser = self.student.denoiser
        if is_last or not isinstance(denoiser, DistributedDataParallel):
            return nullcontext()
        return denoiser.no_sync()

    def _note(self, t: Tensor, error: Tensor) -> None:
        """Add the errors that are finite to the sums of the log."""
        is_finite = torch.isfinite(error) & (self.hold == 0)
        chosen = (t * LOG_BINS // self.teacher.T)[:, None] == self.bins
        chosen &= is_finite[:, None]
        rows = chosen.to(self.sums.dtype)
        self.sums += (rows * torch.where(is_finite, error, 0).to(rows)[:, None]).sum(0)
        self.counts += rows.sum(0)

    # -- update ------------------------------------------------------------------------------------

    def _update(self, rates: Rates) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rates.learning_rate
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._means(), self.parameters, float(rates.ema))

    def _update_on_device(self, finite: Tensor, rates: Rates) -> None:
        """Update as `_update` does, if `finite`, without a decision of the host."""
        skips = torch.maximum((~finite).float(), self.hold)
        for group in self.optimizer.param_groups:
            group["lr"] = rates.learning_rate
        self.optimizer.found_inf = skips  # type: ignore[attr-defined]  # as torch's GradScaler does
        self.optimizer.step()
        change = torch._foreach_sub([p.detach() for p in self.parameters], self._means())
        torch._foreach_mul_(change, rates.ema * (1 - skips))
        torch._foreach_add_(self._means(), change)

    def _rescale(self, finite: Tensor) -> None:
        steps = torch.where(finite, self.finite_steps + 1, 0)
        grows = steps >= GROWTH_STEPS
        scale = torch.where(finite, torch.where(grows, 2 * self.scale, self.scale), self.scale / 2)
        keeps = self.hold > 0
        self.finite_steps.copy_(torch.where(keeps, self.finite_steps, torch.where(grows, 0, steps)))
        self.scale.copy_(torch.where(keeps, self.scale, scale))

    def _means(self) -> list[Tensor]:
        return list(self.ema.values())

    # -- state -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return what the step keeps besides parameters and optimizer, by name."""
        own = {
            "log.sums": self.sums,
            "log.counts": self.counts,
            "scale": self.scale,
            "finite_steps": self.finite_steps,
        }
        return own | {f"ema.{name}": value for name, value in self.ema.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `state` returned, in place."""
        for name, value in self.state().items():
            if name in tensors:
                value.copy_(tensors[name])

    def take_log(self) -> tuple[float, list[float]]:
        """Return the mean error, that of each bin, NaN if it is empty, and begin new sums."""
        sums, counts = self.sums.cpu().clone(), self.counts.cpu().clone()
        self.sums.zero_()
        self.counts.zero_()
        if self.world.size > 1:
            both = torch.stack([sums, counts]).to(self.device)
            torch.distributed.all_reduce(both)
            sums, counts = both.cpu()
        return float(sums.sum() / counts.sum()), (sums / counts).tolist()
