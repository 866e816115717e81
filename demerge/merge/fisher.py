"""Fisher merging: a mean weighted by how much each expert's loss depends on each weight (arXiv 2111.09832).

    theta = sum_i c_i F_i theta_i / sum_i c_i F_i = theta_0 + sum_i c_i F_i tau_i / sum_i c_i F_i

F_i [*] is the diagonal Fisher of expert i on its own range of timesteps, E[g^2] of the range loss per example
(`demerge.fisher.range_fisher`). `normalise`: `none`, `l2` divides F_i by its norm over the model, `layer` by its norm
over the tensor. Where every F_i is 0, the weighted mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from demerge.merge.linear import nonzero_sum, weighted_sum
from demerge.merge.registry import Block, Scope, Statistic, method


def fisher_norms(blocks: Iterable[Block]) -> Tensor:
    """Return |F_i|_2 for each expert [K]; 1 where F_i is 0. Rounded to float32, so that the order of the sum does not show."""
    squares = torch.stack([block.inputs["fisher"].double().square().sum(1) for block in blocks]).sum(0)
    return torch.where(squares > 0, squares.sqrt(), 1.0).float()


def _scope(options: Mapping[str, Any]) -> Scope | None:
    scopes: dict[str, Scope | None] = {"none": None, "l2": "model", "layer": "tensor"}
    return scopes[options["normalise"]]


@method("fisher", paper="arXiv 2111.09832", statistics=(Statistic("norm", fisher_norms, _scope),), off={})
def fisher(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    fisher: Tensor,
    norm: Tensor | None,
    normalise: Literal["none", "l2", "layer"] = "none",
) -> Tensor:
    """Return the mean of the experts weighted by c_i F_i, entry by entry [*].

    Raises:
        UsageError: where the weights sum to 0.
    """
    importance = (fisher.double() if norm is None else fisher.double() / _column(norm, fisher)) * _column(weights, fisher)
    total = importance.sum(0)
    mean = weighted_sum(deltas, weights / nonzero_sum(weights))
    weighted = (importance * deltas).sum(0) / torch.where(total == 0, 1.0, total)
    return base + torch.where(total == 0, mean, weighted.to(deltas.dtype))


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.double().view(-1, *[1] * (like.ndim - 1))
