"""Model stock: the mean of the experts, drawn towards the base by the angle between them
(arXiv 2403.19522).

    theta = theta_0 + t sum_i w_i tau_i / sum_i w_i,  t = N c / (1 + (N - 1) c)
    c = sum_{i<j} v_ij cos(tau_i, tau_j) / sum_{i<j} v_ij,  v_ij = abs(w_i w_j)
    N = (sum_i w_i)^2 / sum_i w_i^2

for each tensor, for each of its rows (`by=row`: one output each, vectors are one row) or once for
the model. With equal weights c is the mean over all pairs and N = K. A task vector of 0 has the
cosine 0 to all; one expert alone has t = 1. An expert of weight 0 is left out.

Differs from the paper, which has two experts and no weights, by the mean over pairs and by v and N,
and if task vectors are all but opposite: t has a pole at c = -1/(N - 1) and is 0 if
1 + (N - 1) c <= 0.01. `negative=base` gives the base for all that disagree (c < 0).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from demerge.merging.methods.linear import nonzero_sum, weighted_sum
from demerge.merging.methods.shared.geometry import cosines, gram, row_grams
from demerge.merging.registry import Statistic, method

POLE = 0.01


def ratio(grams: Tensor, weights: Tensor, pairs: str, negative: str) -> Tensor:
    """Return t [...] for Gram matrices [... K K] and weights [K]."""
    say = weights != 0
    w, grams = weights[say].double(), grams[..., say, :][..., say]
    apart = torch.ones(len(w), len(w), dtype=w.dtype, device=w.device).triu(1)
    v = (w.unsqueeze(1) * w).abs() * (apart if pairs == "all" else apart - apart.triu(2))
    total = v.sum()
    if total == 0:
        return torch.ones(grams.shape[:-2], dtype=w.dtype, device=w.device)
    c = (v * cosines(grams)).sum((-2, -1)) / total
    c = c.clamp_min(0) if negative == "base" else c
    N = nonzero_sum(w).square() / w.square().sum()
    below = 1 + (N - 1) * c
    return torch.where(below > POLE, N * c / below.clamp_min(POLE), 0.0)


@method(
    "model_stock",
    paper="arXiv 2403.19522",
    statistics=(
        Statistic(
            "gram", gram, lambda o: o["by"] if o["by"] != "row" else None, uses_weights=False
        ),
    ),
    full_tensor_if=lambda o: o["by"] == "row",
)
def model_stock(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    gram: Tensor | None,
    by: Literal["tensor", "row", "model"] = "tensor",
    pairs: Literal["all", "adjacent"] = "all",
    negative: Literal["keep", "base"] = "keep",
    scale: float = 1.0,
) -> Tensor:
    """Average the experts, and move towards the base the more they disagree [*].

    Args:
        by: what angles are measured over: each tensor, each row of it, or the model
        pairs: which experts are compared: all, or those that follow one another, as in sd-mecha
        negative: what follows from a negative mean cosine: its formula, or the base

    Raises:
        UsageError: if the weights sum to 0.
    """
    mean = weighted_sum(deltas, weights / nonzero_sum(weights))
    if gram is not None:
        return base + scale * ratio(gram, weights, pairs, negative).to(base.dtype) * mean
    rows = deltas.reshape(len(deltas), base.shape[0] if base.ndim > 1 else 1, -1)
    t = ratio(row_grams(rows), weights, pairs, negative).to(base.dtype)
    return base + scale * (t.unsqueeze(1) * mean.reshape(rows.shape[1:])).view(base.shape)
