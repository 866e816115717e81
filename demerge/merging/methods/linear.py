"""The weighted mean of the experts, and the weighted sum of their task vectors.

    average           theta = sum_i w_i theta_i / sum_i w_i         (model soups, arXiv 2203.05482)
    task_arithmetic   theta = theta_0 + lambda sum_i w_i tau_i      (arXiv 2212.04089)

with tau_i = theta_i - theta_0. DeMe (arXiv 2410.06664) uses the second. The mean is formed as
theta_0 + sum_i w_i tau_i / sum_i w_i, which rounds less.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from demerge.errors import UsageError
from demerge.merging.registry import method


@method("average", paper="arXiv 2203.05482", aliases=("linear",), neutral_options={})
def average(base: Tensor, deltas: Tensor, *, weights: Tensor) -> Tensor:
    """Average the experts with weights that are divided by their sum [*].

    Raises:
        UsageError: if the weights sum to 0.
    """
    return weighted_sum(deltas, weights / nonzero_sum(weights)).add_(base)


@method("task_arithmetic", paper="arXiv 2212.04089", neutral_options={})
def task_arithmetic(base: Tensor, deltas: Tensor, *, weights: Tensor, scale: float = 1.0) -> Tensor:
    """Add the weighted sum of the task vectors, times `scale`, to the base [*]."""
    return weighted_sum(deltas, scale * weights).add_(base)


def weighted_sum(deltas: Iterable[Tensor], weights: Tensor) -> Tensor:
    """Return sum_i w_i tau_i [*] of K deltas [*], in the order of the experts."""
    (first, weight), *others = zip(deltas, weights, strict=True)
    total: Tensor = first * weight
    for delta, weight in others:
        total.addcmul_(delta, weight)
    return total


def nonzero_sum(weights: Tensor) -> Tensor:
    """Return the sum of the weights []."""
    total = weights.sum()
    if total == 0:
        fix = "give weights with another sum, or use task_arithmetic"
        raise UsageError("the weights of a mean sum to 0", fix=fix)
    return total
