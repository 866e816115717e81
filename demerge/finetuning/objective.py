"""The objective of one expert (DeMe, arXiv 2410.06664, Eq. 4-6).

    q_i(t) = (1 - p) U[lo_i, hi_i) + p U[0, T)
    L_i    = E_{t ~ q_i} [ w(t) |y - f_i(x_t, t)|^2  +  lambda |f_0(x_t, t) - f_i(x_t, t)|^2 ]

f_0 is the frozen base on the same (x_t, t, c). For w = 1 this equals (1 + lambda) |f_i - ybar|^2 +
const with ybar = (y + lambda f_0) / (1 + lambda): the expert is drawn to a target between the data
and the base, and lambda = 1 halves the correction it can reach. lambda may be 0, and may decay over
the run.

Differs from the paper's released code, which overwrites f_0 by the student's average at each
preview: ours never changes.

Loss weights w(t), with a = abar_t, s = 1 - a and SNR = a / s; for flow matching a = (1 - sigma)^2,
s = sigma^2, and the column is v_prediction, since |x_0 - x_hat|^2 = sigma^2 |y - y_hat|^2. A weight
is defined on one kind of error and divided for the others, since |eps - eps_hat|^2 = SNR |x_0 -
x_hat|^2 and |v - v_hat|^2 = (SNR + 1) |x_0 - x_hat|^2:

                   on x_0            epsilon            v_prediction     sample           arXiv
    min-snr        min(SNR, gamma)   min(1, gamma s/a)  min(a, gamma s)  min(a/s, gamma)  2303.09556
    truncated-snr  max(SNR, 1)       max(1, s/a)        max(a, s)        max(a/s, 1)      2202.00512
    snr+1          SNR + 1           1/a                1                1/s              2202.00512
    p2             SNR / d           1 / d              a / d            SNR / d          2204.00227
    one            1 for every prediction type

In p2, d = (k + SNR)^gamma; for k = gamma = 1 the row is a, s, a s, a. `uncertainty` is learned on
top of `one` (`demerge.finetuning.uncertainty`). In a and s the weights have their limits at SNR 0
and infinity. An infinite weight is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from demerge.diffusion.model import Diffusion, below
from demerge.errors import UsageError
from demerge.finetuning.options import Decay, FinetuneOptions
from demerge.randomness import uniform
from demerge.timestep_conventions import density_of, shift, unshift
from demerge.timesteps import TimestepRange

# below 1 / 2^-24: for zero terminal SNR some schedulers of diffusers set abar = 2^-24
LARGEST_WEIGHT = 2.0**23
LEAST_SHARE = 1e-6  # of the draws; below, float64 loses the quantiles
OF_FLOWS = ("density", "logit_mean", "logit_std", "mode_scale", "shift")


def draw_timesteps(
    span: TimestepRange,
    T: int,
    options: FinetuneOptions,
    step: int,
    samples: Sequence[int],
    flow_shift: float | None = None,
) -> Tensor:
    """Draw t ~ q_i, [B]; t of a sample depends on (seed, step, sample).

    They are integers. With `flow_shift`, the s of a flow's schedule, they are any numbers of the
    density of `options`, restricted to the range by its quantiles.

    `sampling="mixture"` tosses the coin for each sample. `sampling="paper"` tosses it once for the
    batch and mirrors the second half of the batch inside the interval, as the paper's code does.
    """
    u = uniform(options.seed, "timestep", samples=samples, step=step)
    if options.sampling == "paper":
        coin = uniform(options.seed, "range or all", samples=[-1], step=step).expand(len(samples))
        half = (len(samples) + 1) // 2
        u = torch.cat([u[:half], (1 - u[:half])[: len(samples) - half]]).clamp(max=1 - 2**-53)
    else:
        coin = uniform(options.seed, "range or all", samples=samples, step=step)
    is_global = coin < options.global_prob
    if flow_shift is None:
        inside = (span.start + u * len(span)).long()
        return torch.where(is_global, (u * T).long(), inside)
    density = density_of(options)
    edges = torch.tensor([span.start, span.stop], dtype=torch.float64) / T
    low, high = density.cdf(unshift(edges, flow_shift))
    v = torch.where(is_global, u, low + u * (high - low))
    t = (T * shift(density.quantile(v), flow_shift)).float()
    inside = below(t.clamp(min=span.start), span.stop)
    return torch.where(is_global, below(t, T), inside)


def check_density(
    model: Diffusion, options: FinetuneOptions, ranges: Iterable[TimestepRange]
) -> None:
    """Check that the density of a flow's draws reaches each range.

    Raises:
        UsageError: if it does not, or the model is no flow and an option of flows is given.
    """
    if not model.is_flow:
        default, own = FinetuneOptions(), options
        names = [n for n in OF_FLOWS if getattr(own, n) != getattr(default, n)]
        if names:
            what = f"{names[0]} is {getattr(own, names[0])}, and the base is no flow"
            raise UsageError(what, fix=f"leave out --{names[0].replace('_', '-')}")
        return
    for span in ranges:
        edges = torch.tensor([span.start, span.stop], dtype=torch.float64) / model.T
        low, high = density_of(options).cdf(unshift(edges, options.shift or model.shift))
        if high - low < LEAST_SHARE:
            what = f"density {options.density} gives range {span} {float(high - low):.1g} of its"
            raise UsageError(f"{what} draws", fix="choose another density, shift or range")


def loss_weights(model: Diffusion, options: FinetuneOptions) -> Tensor:
    """Return w(t) for the model's prediction type, [T] float64.

    Raises:
        UsageError: if w(t) is infinite, or so large that float32 loses the other timesteps.
    """
    (a, s), gamma = model.powers, options.snr_gamma
    one = torch.ones_like(a)
    whole = a + s if model.is_flow else one
    k, power = options.p2_k, options.p2_gamma
    scaled = (k * s + a) ** power  # (k + SNR)^gamma s^gamma
    table = {
        "one": {"epsilon": one, "v_prediction": one, "sample": one},
        "min-snr": {
            "epsilon": (gamma * s / a).clamp(max=1),
            "v_prediction": torch.minimum(a, gamma * s),
            "sample": (a / s).clamp(max=gamma),
        },
        "truncated-snr": {
            "epsilon": (s / a).clamp(min=1),
            "v_prediction": torch.maximum(a, s),
            "sample": (a / s).clamp(min=1),
        },
        "snr+1": {"epsilon": 1 / a, "v_prediction": whole, "sample": 1 / s},
        "p2": {
            "epsilon": s**power / scaled,
            "v_prediction": a * s**power / scaled,
            "sample": a * s ** (power - 1) / scaled,
        },
    }[options.loss_weight if options.loss_weight != "uncertainty" else "one"]
    kind = "v_prediction" if model.is_flow else model.prediction_type
    weights = table[kind]
    if float(weights.max()) > LARGEST_WEIGHT:
        t = int(weights.argmax())
        value, abar = f"{float(weights[t]):.3g}", f"{float(a[t]):.3g}"
        what = f"loss weight {options.loss_weight} is {value} at t = {t}: abar is {abar}"
        fix = "use --loss-weight min-snr, p2 or one"
        raise UsageError(f"{what} and the base predicts {model.prediction_type}", fix=fix)
    return weights


def consistency_weight(options: FinetuneOptions, step: int) -> float:
    """Return lambda at a step: constant, or decaying to 0 at the end of the run."""
    progress = step / options.max_train_steps
    return options.consistency * _decay(options.consistency_schedule, progress)


def learning_rate(options: FinetuneOptions, step: int) -> float:
    """Return the learning rate at a step: a linear warm-up, then as `consistency_weight`."""
    warmup = options.lr_warmup_steps
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, options.max_train_steps - warmup)
    return options.learning_rate * _decay(options.lr_scheduler, progress)


def _decay(kind: Decay, progress: float) -> float:
    if kind == "constant":
        return 1.0
    return 1 - progress if kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
