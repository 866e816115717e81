"""Isotropic merging: a task matrix whose singular values are all equal (arXiv 2502.04959).

Iso-C flattens the spectrum of the sum of the task matrices:

    sum_i c_i tau_i = U S V^T                 theta = theta_0 + lambda mean(S) U V^T

Iso-CTS gives the last of min(m, n) dimensions, s to each expert, to what the first k common ones
leave of it:

    k = min(m, n) - K s                       s = round((min(m, n) - floor(min(m, n) common)) / K)
    U_i S_i V_i^T                             the s leading triples of (I - U_k U_k^T) c_i tau_i
    U* = polar([U_1 .. U_K U_k])              V* likewise, S* = (S_1 .. S_K S_k)
                                              theta = theta_0 + lambda mean(S*) U* V*^T

Differs from the paper if singular values are 0: their vectors are arbitrary, so they stay out of
the mean and of the result. Differs also for an expert that is alone: it is the result.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from demerge.merging.method_options import Between
from demerge.merging.methods.shared.spectral import (
    ROUNDING,
    merge_matrices,
    norm,
    polar,
    thin_svd,
    total,
)
from demerge.merging.registry import method


@method("iso_c", paper="arXiv 2502.04959", needs_full_tensor=True)
def iso_c(base: Tensor, deltas: Tensor, *, weights: Tensor, scale: float = 1.0) -> Tensor:
    """Add the sum of the task matrices with all singular values made equal [*].

    Weights are relative: c_i = w_i / max_j abs(w_j).
    """
    return merge_matrices(
        base, deltas, weights, scale, lambda matrices, c: _flatten(total(matrices, c))
    )


@method("iso_cts", paper="arXiv 2502.04959", needs_full_tensor=True)
def iso_cts(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    common: Annotated[float, Between(0, 1)] = 0.8,
    scale: float = 1.0,
) -> Tensor:
    """Add common and expert-specific directions of the task matrices, all of equal strength [*].

    Weights are relative: c_i = w_i / max_j abs(w_j).

    Args:
        common: share of the dimensions that all experts have in common
    """
    return merge_matrices(
        base, deltas, weights, scale, lambda matrices, c: _common_and_specific(matrices, c, common)
    )


def _flatten(matrix: Tensor) -> Tensor:
    U, S, Vh = thin_svd(matrix)
    return S.sum() / max(1, len(S)) * (U @ Vh)


def _common_and_specific(matrices: list[Tensor], c: Tensor, common: float) -> Tensor:
    dimensions, K = min(matrices[0].shape), len(matrices)
    s = min(round((dimensions - int(dimensions * common)) / K), dimensions // K)
    shared = thin_svd(total(matrices, c), dimensions - K * s)
    parts = []
    for matrix, c_i in zip(matrices, c, strict=True):
        tau = matrix.double() * c_i
        rest = tau - shared.U @ (shared.U.mT @ tau)
        parts.append(thin_svd(rest, s, zero=ROUNDING * norm(tau.detach())))
    parts.append(shared)
    U, Vh = torch.cat([p.U for p in parts], 1), torch.cat([p.Vh for p in parts])
    S = torch.cat([p.S for p in parts])
    return S.sum() / max(1, len(S)) * (polar(U) @ polar(Vh))
