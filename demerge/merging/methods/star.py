"""STAR: spectral truncation and rescale (arXiv 2502.10339).

    tau_i = U S V^T                           r the least number with S_1 + .. + S_r >= eta |S|_1
    tau_i' = |S|_1 / (S_1 + .. + S_r) sum_{j <= r} S_j u_j v_j^T
    theta = theta_0 + lambda sum_i w_i tau_i'

The nuclear norm of each task matrix is kept, in fewer directions. The paper has no lambda; with
weights 1/K each and lambda 1 the sum is its mean. Vectors are added without truncation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from demerge.merging.method_options import Share
from demerge.merging.methods.linear import weighted_sum
from demerge.merging.methods.shared.spectral import as_matrix, thin_svd
from demerge.merging.registry import method


@method("star", paper="arXiv 2502.10339", needs_full_tensor=True, neutral_options={"eta": 1.0})
def star(
    base: Tensor, deltas: Tensor, *, weights: Tensor, eta: Share = 0.4, scale: float = 1.0
) -> Tensor:
    """Keep the leading singular directions of each task matrix, rescale it, and sum [*].

    Args:
        eta: share of the nuclear norm that is kept, 40 % in the paper
    """
    if eta == 1 or min(as_matrix(base).shape) < 2:
        return base + weighted_sum(deltas, scale * weights)
    truncated = [_truncate(as_matrix(delta), eta).to(delta.dtype) for delta in deltas]
    return base + weighted_sum(truncated, scale * weights).view_as(base)


def _truncate(matrix: Tensor, eta: float) -> Tensor:
    U, S, Vh = thin_svd(matrix)
    if not len(S):
        return matrix
    sums = S.cumsum(0)
    r = 1 + min(int(torch.searchsorted(sums, eta * sums[-1])), len(S) - 1)
    return U[:, :r] * (S[:r] * (sums[-1] / sums[r - 1])) @ Vh[:r]
