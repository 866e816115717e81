"""TSV-Merge: the leading singular vectors of the task matrices, made orthogonal to one another
(arXiv 2412.00081).

    tau_i ~ U_i S_i V_i^T                    the r leading triples, r = max(1, floor(min(m, n) / K))
    U = polar([U_1 .. U_K])                  V = polar([V_1 .. V_K])
    theta = theta_0 + lambda U diag(c_1 S_1, .., c_K S_K) V^T

Differs from the paper if singular values are 0: their vectors, which are arbitrary, stay out, and
if experts share directions exactly, the polar factor leaves the missing ones at 0. Differs also by
r >= 1, without which small tensors would not be merged at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from demerge.merging.methods.shared.spectral import merge_matrices, polar, thin_svd
from demerge.merging.registry import method


@method("tsv", paper="arXiv 2412.00081", needs_full_tensor=True)
def tsv(base: Tensor, deltas: Tensor, *, weights: Tensor, scale: float = 1.0) -> Tensor:
    """Sum the leading singular directions of the task matrices, made orthogonal to each other [*].

    Weights are relative: c_i = w_i / max_j abs(w_j).
    """
    return merge_matrices(base, deltas, weights, scale, _orthogonalize)


def _orthogonalize(matrices: list[Tensor], c: Tensor) -> Tensor:
    r = max(1, min(matrices[0].shape) // len(matrices))
    triples = [thin_svd(matrix, r) for matrix in matrices]
    U, Vh = torch.cat([t.U for t in triples], 1), torch.cat([t.Vh for t in triples])
    S = torch.cat([t.S * c_i for t, c_i in zip(triples, c, strict=True)])
    return polar(U) * S @ polar(Vh)
