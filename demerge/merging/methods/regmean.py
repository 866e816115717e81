"""RegMean: the linear layer whose outputs are nearest to those of all experts on their inputs
(arXiv 2212.09849).

    min_W sum_i w_i E|W x - W_i x|^2 over the inputs x of expert i
    W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1,  G_i = E[x x^T] [in in], off-diagonals times alpha

Solved for task vectors, as LOT does, and as a correction of their mean m = sum_i w_i tau_i / sum_i
w_i:

    theta = theta_0 + m + (sum_i w_i (tau_i - m) G_i) (sum_i w_i G_i)^+

which is the same if sum_i w_i G_i has an inverse, and the mean in directions in which no expert had
inputs. A 1x1 convolution is the matrix (out, in); a tensor without Gram matrices is the mean.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from demerge.errors import InputError
from demerge.merging.method_options import Between
from demerge.merging.methods.fisher import check_weights_not_negative
from demerge.merging.methods.linear import nonzero_sum, weighted_sum
from demerge.merging.methods.shared.spectral import ROUNDING, as_matrix, solve, total, unit
from demerge.merging.registry import method
from demerge.storage.checkpoint import finite

SYMMETRIC = 1e-3  # of the largest entry: what sums in half precision may miss


@method(
    "regmean",
    paper="arXiv 2212.09849",
    aliases=("lot",),
    needs_full_tensor=True,
    neutral_options={},
)
def regmean(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    gram: Tensor | None,
    alpha: Annotated[float, Between(0, 1)] = 0.9,
) -> Tensor:
    """Find the layer whose outputs are nearest to those of all experts on their inputs [*].

    Weights are relative.

    Args:
        alpha: factor of the off-diagonals of the Gram matrices; 1 is the plain regression

    Raises:
        UsageError: if a weight is negative, or they sum to 0.
        InputError: if the Gram matrices do not fit the tensor, or are not Gram matrices.
    """
    check_weights_not_negative(weights, "regmean")
    w = weights / nonzero_sum(weights)
    mean = weighted_sum(deltas, w)
    if gram is None:
        return base + mean
    _check_gram(gram, base)
    correction = _correction(deltas, mean, _damp(gram, alpha), w.double())
    return base + mean + correction.to(base.dtype).view_as(base)


def _check_gram(gram: Tensor, base: Tensor) -> None:
    n = as_matrix(base).shape[1]
    place = f"for a weight {list(base.shape)}"
    if gram.shape[1:] != (n, n):
        what = f"the Gram matrices do not fit: {list(gram.shape[1:])} {place}"
        raise InputError(what, fix="make gram.safetensors with these experts")
    is_positive = bool((gram.diagonal(dim1=1, dim2=2) >= 0).all())
    if n and not (finite(gram) and is_positive and _is_symmetric(gram)):
        fault = "holds NaN or Inf, is not symmetric, or has a negative diagonal"
        raise InputError(f"a Gram matrix {place} {fault}", fix="make gram.safetensors again")


def _is_symmetric(gram: Tensor) -> bool:
    uneven = (gram - gram.mT).abs().amax((1, 2))
    return bool((uneven <= SYMMETRIC * gram.abs().amax((1, 2))).all())


def _damp(gram: Tensor, alpha: float) -> Tensor:
    """Return the Gram matrices [K in in] in float64 over their largest entry, alpha applied."""
    scaled = gram.double() / unit(gram).double()
    return alpha * scaled + (1 - alpha) * torch.diag_embed(scaled.diagonal(dim1=1, dim2=2))


def _correction(deltas: Tensor, mean: Tensor, gram: Tensor, w: Tensor) -> Tensor:
    """Return (sum_i w_i (tau_i - m) G_i) (sum_i w_i G_i)^+ [out in]."""
    pairs = zip(deltas, gram, strict=True)
    right = total([as_matrix(delta - mean).double() @ G for delta, G in pairs], w)
    return solve(right, total(list(gram), w), rtol=ROUNDING)
