"""PCB: parameter competition balancing (arXiv 2410.02396, as in the authors' code).

    c_i   = sgn(tau_i) min(max(abs(tau_i), l_i), h_i)          l, h: the quantiles `clip` and 1 - `clip` of abs(tau_i)
    intra = exp(K minmax(abs(c_i))^2)                          an entry against the others of its task vector
    inter = tanh(r_i tau_i sum_j r_j tau_j)                    an entry against the same one of the other experts
    p_i   = intra inter
    s_i   = minmax(max(p_i, q_i))                              q: the k-th largest p_i, k = ceil(density n)
    theta = theta_0 + lambda sum_i w_i s_i c_i / sum_i abs(w_i) s_i

over the whole model (`scope=model`, the authors') or each tensor. minmax(x) = (x - min x) / (max x - min x); where all p
that are left are equal, each has s = 1; where no expert has a score, the base stays. Differs from the authors' code by the
weights (r_i = w_i / max abs(w), equal ones give its formula), by the upper quantile, which is the (1 + floor(clip n))-th
largest, and by a factor exp(-K) on all p, which minmax undoes and without which they overflow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from demerge.merging.method_options import Between
from demerge.merging.methods.linear import weighted_sum
from demerge.merging.methods.selection import kth
from demerge.merging.methods.statistics import relative
from demerge.merging.registry import Block, Blocks, Scope, Statistic, method


def clip_bounds(blocks: Blocks, *, clip: float) -> Tensor:
    """Return l and h, the bounds of the magnitudes [2 K]."""
    low = kth(blocks, lambda block: block.deltas, lambda n: n - math.floor(clip * n))
    high = kth(blocks, lambda block: block.deltas, lambda n: 1 + math.floor(clip * n))
    return torch.stack([low, high])


def scores(deltas: Tensor, weights: Tensor, bounds: Tensor, balance: str) -> Tensor:
    """Return p [K *], times exp(-K)."""
    r, K = relative(weights), int(weights.count_nonzero())
    mean = weighted_sum(deltas, r / max(K, 1))
    rows = []
    for delta, weight, low, high in zip(deltas, r, *bounds.tolist(), strict=True):
        p = torch.ones_like(delta)
        if balance in ("both", "intra") and high > low:
            p = (
                delta.abs()
                .clamp_(low, high)
                .sub_(low)
                .div_(high - low)
                .square_()
                .sub_(1)
                .mul_(K)
                .exp_()
            )
        if balance in ("both", "inter"):
            p = p * torch.tanh(K * (weight * delta * mean))
        rows.append(p)
    return torch.stack(rows)


def score_bounds(
    blocks: Blocks, *, weights: Tensor, bounds: Tensor, balance: str, density: float
) -> Tensor:
    """Return q and the largest p of each expert [2 K].

    The k-th largest number is the k-th largest positive part, less the (n - k + 1)-th largest negative part.
    """

    def p(block: Block) -> Tensor:
        return scores(block.deltas, block.weights, bounds, balance)

    largest = list(blocks.map(lambda block: p(block).reshape(len(weights), -1).amax(1)))
    if not largest:
        return torch.zeros(2, len(weights))
    q = kth(
        blocks, lambda block: p(block).clamp_min(0), lambda n: n - math.floor(n * (1 - density))
    )
    if not q.all():
        q = q - kth(
            blocks,
            lambda block: (-p(block)).clamp_min(0),
            lambda n: 1 + math.floor(n * (1 - density)),
        )
    return torch.stack([q.to(largest[0]), torch.stack(largest).amax(0)])


def _scope(options: Mapping[str, Any]) -> Scope:
    scope: Scope = options["scope"]
    return scope


@method(
    "pcb",
    paper="arXiv 2410.02396",
    statistics=(
        Statistic("bounds", clip_bounds, _scope, uses_weights=False),
        Statistic("margin", score_bounds, _scope),
    ),
    neutral_options={"density": 1.0, "clip": 0.0, "balance": "none"},
)
def pcb(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    bounds: Tensor,
    margin: Tensor,
    density: Annotated[float, Between(0, 1, open_low=True)] = 0.1,
    clip: Annotated[float, Between(0, 0.5)] = 1e-4,
    balance: Literal["both", "intra", "inter", "none"] = "both",
    scope: Literal["model", "tensor"] = "model",
    scale: float = 1.0,
) -> Tensor:
    """Return the base plus `scale` (lambda) times the mean of the clipped task vectors, weighted by their scores [*].

    `density` is the share of entries with a score; `balance` says which of the two competitions count. Weights are relative.
    """
    p = scores(deltas, weights, bounds, balance)
    total, mass = torch.zeros_like(base), torch.zeros_like(base)
    for i, (low, high) in enumerate(zip(*bounds.tolist(), strict=True)):
        clipped = deltas[i].sign() * deltas[i].abs().clamp(low, high)
        s = _minmax(p[i], *margin[:, i].tolist())
        total = total + s * (weights[i] * clipped)
        mass = mass + s * weights[i].abs()
    return base + scale * (total / torch.where(mass > 0, mass, 1.0))


def _minmax(p: Tensor, q: float, largest: float) -> Tensor:
    """Return s [*]."""
    return ((p - q) / (largest - q)).clamp_min(0) if largest > q else (p >= q).to(p)
