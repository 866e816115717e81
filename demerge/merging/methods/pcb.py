"""PCB: parameter competition balancing (arXiv 2410.02396, as in the authors' code).

    c_i   = sgn(tau_i) min(max(abs(tau_i), l_i), h_i)    l, h: the quantiles `clip` and 1 - `clip`
    intra = exp(K minmax(abs(c_i))^2)                    an entry against others of its task vector
    inter = tanh(r_i tau_i sum_j r_j tau_j)              an entry against those of the other experts
    p_i   = intra inter
    s_i   = minmax(max(p_i, q_i))                        q: the ceil(density n)-th largest p_i
    theta = theta_0 + lambda sum_i w_i s_i c_i / sum_i abs(w_i) s_i

over the whole model (`scope=model`, the authors') or each tensor. minmax(x) = (x - min x) / (max x
- min x); if all p that are left are equal, each has s = 1; if no expert has a score, the base
stays. Differs from the authors' code by the weights (r_i = w_i / max abs(w), equal ones give its
formula), by the upper quantile, which is the (1 + floor(clip n))-th largest, and by a factor
exp(-K) on all p, which minmax undoes and without which they overflow.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from demerge.merging.method_options import Between, Share
from demerge.merging.methods.linear import weighted_sum
from demerge.merging.methods.shared.geometry import relative
from demerge.merging.methods.shared.selection import kth
from demerge.merging.registry import Block, Blocks, Statistic, method


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
            unit = delta.abs().clamp_(low, high).sub_(low).div_(high - low)
            p = unit.square_().sub_(1).mul_(K).exp_()
        if balance in ("both", "inter"):
            p = p * torch.tanh(K * (weight * delta * mean))
        rows.append(p)
    return torch.stack(rows)


def score_bounds(
    blocks: Blocks, *, weights: Tensor, bounds: Tensor, balance: str, density: float
) -> Tensor:
    """Return q and the largest p of each expert [2 K].

    The k-th largest is that of the positive parts, less the (n - k + 1)-th of the negative parts.
    """

    def p(block: Block) -> Tensor:
        return scores(block.deltas, block.weights, bounds, balance)

    def below(n: int) -> int:
        return math.floor(n * (1 - density))

    largest = list(blocks.map(lambda block: p(block).reshape(len(weights), -1).amax(1)))
    if not largest:
        return torch.zeros(2, len(weights))
    q = kth(blocks, lambda block: p(block).clamp_min(0), lambda n: n - below(n))
    if not q.all():
        q = q - kth(blocks, lambda block: (-p(block)).clamp_min(0), lambda n: 1 + below(n))
    return torch.stack([q.to(largest[0]), torch.stack(largest).amax(0)])


@method(
    "pcb",
    paper="arXiv 2410.02396",
    statistics=(
        Statistic("bounds", clip_bounds, lambda o: o["scope"], uses_weights=False),
        Statistic("margin", score_bounds, lambda o: o["scope"]),
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
    density: Share = 0.1,
    clip: Annotated[float, Between(0, 0.5)] = 1e-4,
    balance: Literal["both", "intra", "inter", "none"] = "both",
    scope: Literal["model", "tensor"] = "model",
    scale: float = 1.0,
) -> Tensor:
    """Average the task vectors, each entry weighted by how it competes with all others [*].

    Weights are relative.

    Args:
        density: share of the entries that get a score
        clip: share of the smallest and of the largest magnitudes that are clipped
        balance: which competitions count: within a task vector, between the experts, or both
    """
    p = scores(deltas, weights, bounds, balance)
    total, mass = torch.zeros_like(base), torch.zeros_like(base)
    for i, (low, high) in enumerate(zip(*bounds.tolist(), strict=True)):
        clipped = deltas[i].sign() * deltas[i].abs().clamp(low, high)
        q, largest = margin[:, i].tolist()
        s = ((p[i] - q) / (largest - q)).clamp_min(0) if largest > q else (p[i] >= q).to(p)
        total = total + s * (weights[i] * clipped)
        mass = mass + s * weights[i].abs()
    return base + scale * (total / torch.where(mass > 0, mass, 1.0))
