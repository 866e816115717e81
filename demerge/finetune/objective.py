"""The objective of one expert (DeMe, arXiv 2410.06664, Eq. 4-6).

    q_i(t) = (1 - p) U[lo_i, hi_i) + p U[0, T)
    L_i    = E_{t ~ q_i} [ w(t) |y - f_i(x_t, t)|^2  +  lambda |f_0(x_t, t) - f_i(x_t, t)|^2 ]

f_0 is the frozen base on the same (x_t, t, c). For w = 1 this equals (1 + lambda) |f_i - ybar|^2 + const with
ybar = (y + lambda f_0) / (1 + lambda): the expert is drawn to a target between the data and the base, and lambda = 1 halves
the correction it can reach. lambda may be 0, and may decay over the run.

Differs from the paper's released code, which overwrites f_0 by the student's average at each preview: ours never changes.

Loss weights w(t), for epsilon prediction; v-prediction divides each by SNR + 1 where the weight is defined on x_0:
    one 1,  min-snr min(SNR, gamma) / SNR (arXiv 2303.09556),  p2 1 / (1 + SNR)^1 (arXiv 2204.00227),
    snr+1 and truncated-snr max(SNR, 1) on x_0 (arXiv 2202.00512), divided by SNR for epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from demerge.diffusion import Diffusion
from demerge.finetune.options import FinetuneOptions
from demerge.randomness import uniform
from demerge.timesteps import TimestepRange


def draw_timesteps(span: TimestepRange, T: int, options: FinetuneOptions, step: int, samples: Sequence[int]) -> Tensor:
    """Draw t ~ q_i, [B] integers; t of a sample depends on (seed, step, sample).

    `sampling="mixture"` tosses the coin for each sample. `sampling="paper"` tosses it once for the batch and mirrors the
    second half of the batch inside the interval, as the paper's released code does.
    """
    u = uniform(options.seed, "timestep", samples=samples, step=step)
    if options.sampling == "paper":
        coin = uniform(options.seed, "range or all", samples=[-1], step=step).expand(len(samples))
        half = (len(samples) + 1) // 2
        u = torch.cat([u[:half], (1 - u[:half])[: len(samples) - half]]).clamp(max=1 - 2**-53)
    else:
        coin = uniform(options.seed, "range or all", samples=samples, step=step)
    inside = (span.start + u * len(span)).long()
    return torch.where(coin < options.p, (u * T).long(), inside)


def loss_weights(model: Diffusion, options: FinetuneOptions) -> Tensor:
    """Return w(t) for the model's prediction type, [T] float64."""
    snr, gamma = model.snr(), options.snr_gamma
    if options.loss_weight == "one":
        return torch.ones_like(snr)
    if options.loss_weight == "p2":
        return 1 / (1 + snr)
    on_x0 = {"min-snr": snr.clamp(max=gamma), "truncated-snr": snr.clamp(min=1), "snr+1": snr + 1}[options.loss_weight]
    return on_x0 / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[model.prediction_type]


def consistency_weight(options: FinetuneOptions, step: int) -> float:
    """Return lambda at a step: constant, or decaying to 0 at the end of the run."""
    progress = step / options.max_train_steps
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return options.consistency * factor[options.consistency_schedule]


def learning_rate(options: FinetuneOptions, step: int) -> float:
    """Return the learning rate at a step: a linear warm-up, then constant, or decaying to 0 at the end of the run."""
    warmup = options.lr_warmup_steps
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, options.max_train_steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return options.learning_rate * factor[options.lr_scheduler]
