"""Fisher merging: a mean weighted by how much each expert's loss depends on each weight
(arXiv 2111.09832).

    theta = sum_i c_i F_i theta_i / sum_i c_i F_i = theta_0 + sum_i c_i F_i tau_i / sum_i c_i F_i

F_i [*] is the diagonal Fisher of expert i on its own range of timesteps, E[g^2] of the range loss
per example (`demerge.statistics.range_fisher`). `normalise`: `none`, `l2` divides F_i by its norm
over the model, `layer` by its norm over the tensor. If every F_i is 0, the weighted mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from demerge.errors import InputError, UsageError
from demerge.merging.methods.linear import nonzero_sum, weighted_sum
from demerge.merging.registry import Blocks, Scope, Statistic, method


def fisher_norms(blocks: Blocks) -> Tensor:
    """Return |F_i|_2 for each expert [K]; 1 if F_i is 0."""
    squares = blocks.map(lambda block: block.input("fisher").double().square().sum(1))
    total = torch.stack(list(squares)).sum(0)
    return torch.where(total > 0, total.sqrt(), 1.0)


def _scope(options: Mapping[str, Any]) -> Scope | None:
    scopes: dict[str, Scope] = {"l2": "model", "layer": "tensor"}
    return scopes.get(options["normalise"])


@method(
    "fisher",
    paper="arXiv 2111.09832",
    statistics=(Statistic("norm", fisher_norms, _scope, uses_weights=False),),
    neutral_options={},
)
def fisher(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    fisher: Tensor,
    norm: Tensor | None,
    normalise: Literal["none", "l2", "layer"] = "none",
) -> Tensor:
    """Average the experts, each entry weighted by its Fisher information [*].

    Args:
        normalise: what each Fisher is divided by: nothing, its norm over the model, or the tensor
    """
    nonzero_sum(weights)
    check_weights_not_negative(weights, "fisher")
    check_not_negative(fisher)
    relative = weights / weights.abs().max()
    if norm is not None:
        relative = relative / (norm / norm.min()).to(relative)
    share = fisher / nonzero(fisher.amax(0))  # in [0, 1]: products of the F themselves might be 0
    total = weighted_sum(share, relative)
    merged = weighted_sum(share * deltas, relative) / nonzero(total)
    if bool(total.abs().min() > 0):
        return base + merged
    mean = weighted_sum(deltas, weights / nonzero_sum(weights))
    return base + torch.where(total == 0, mean, merged)


def check_weights_not_negative(weights: Tensor, what: str) -> None:
    """Refuse weights under which the divisor, another sum for each entry, may come close to 0."""
    if bool((weights < 0).any()):
        least = float(weights.min())
        fix = "give weights of 0 or more, or use task_arithmetic, which takes any sign"
        problem = f"{what} divides by a weighted sum, and the weight {least:g} is negative"
        raise UsageError(problem, fix=fix)


def check_not_negative(fisher: Tensor) -> None:
    """Refuse what is not a mean of squares."""
    if fisher.numel() and bool(fisher.min() < 0):
        what = "a Fisher has negative entries; it is a mean of squares"
        raise InputError(what, fix="make fisher.safetensors again")


def nonzero(values: Tensor) -> Tensor:
    """Return the values [*], with 1 in place of 0."""
    return values if bool(values.abs().min() > 0) else torch.where(values == 0, 1.0, values)
