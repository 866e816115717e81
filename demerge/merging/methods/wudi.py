"""WUDI: the task matrix that interferes least with each expert on the inputs its own task matrix
stands for (arXiv 2503.08099).

    min_tau sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2
    tau sum_i C_i = sum_i tau_i C_i,          C_i = tau_i^T tau_i / |tau_i|^2
    theta = theta_0 + lambda tau

Of the solutions the one of least norm. With weights, C_i becomes c_i^2 C_i and its target c_i
tau_i, so that an expert fades as its weight does. Solved as a correction of the plain sum, with A_i
= c_i tau_i / |tau_i| and a ridge rho:

    tau = s + (sum_i (c_i tau_i - s) A_i^T A_i) (sum_i A_i^T A_i + rho I)^+,    s = sum_i c_i tau_i

which is s if experts share no inputs. Differs from the authors' program, which takes 300 steps of
Adam from s, by being the solution; a ridge leaves the result between s and that. For
T = [A_1; ..; A_K] of fewer rows than columns, as with conv kernels, T^T T + rho I is never formed:
R T (T^T T + rho)^+ = R (T T^T + rho)^+ T.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from demerge.merging.method_options import Between
from demerge.merging.methods.shared.spectral import merge_matrices, norm, solve, total
from demerge.merging.registry import method

RTOL = 1e-12


@method("wudi", paper="arXiv 2503.08099", needs_full_tensor=True)
def wudi(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    ridge: Annotated[float, Between(0, 1e6)] = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """Find the task matrix that interferes least with each expert on its own inputs [*].

    Weights are relative: c_i = w_i / max_j abs(w_j).

    Args:
        ridge: pull towards the plain sum, in units of the mean eigenvalue of sum_i C_i
    """
    return merge_matrices(
        base, deltas, weights, scale, lambda matrices, c: _least_interference(matrices, c, ridge)
    )


def _least_interference(matrices: list[Tensor], c: Tensor, ridge: float) -> Tensor:
    K, (m, n) = len(matrices), matrices[0].shape
    rho = ridge * c.square().sum() / min(K * m, n)
    lengths = torch.stack([norm(matrix) for matrix in matrices])
    triples = zip(matrices, lengths, c, strict=True)
    A = torch.stack([matrix.double() / length * c_i for matrix, length, c_i in triples])
    correction = _by_rows(A, lengths, rho) if K * m < n else _by_columns(A, lengths, rho)
    return total(matrices, c) + correction


def _by_rows(A: Tensor, lengths: Tensor, rho: Tensor) -> Tensor:
    """Return the correction for K m < n, out of T T^T [K m, K m].

    Its blocks are A_j A_i^T, and (c_i tau_i - s) A_i^T = -sum_{j != i} |tau_j| A_j A_i^T:
    interference alone.
    """
    K, m, _ = A.shape
    T = A.flatten(0, 1)
    gram = T @ T.mT
    blocks = gram.view(K, m, K, m)
    columns = []
    for i in range(K):
        others = [-lengths[j] * blocks[j, :, i] for j in range(K) if j != i]
        columns.append(torch.stack(others).sum(0))
    return solve(torch.cat(columns, 1), _add_ridge(gram, rho), RTOL) @ T


def _by_columns(A: Tensor, lengths: Tensor, rho: Tensor) -> Tensor:
    """Return the correction for K m >= n, out of sum_i A_i^T A_i [n n]."""
    s, T = total(list(A), lengths), A.flatten(0, 1)
    terms = []
    for A_i, length in zip(A, lengths, strict=True):
        terms.append(torch.linalg.multi_dot([A_i * length - s, A_i.mT, A_i]))
    return solve(torch.stack(terms).sum(0), _add_ridge(T.mT @ T, rho), RTOL)


def _add_ridge(gram: Tensor, rho: Tensor) -> Tensor:
    return gram + rho * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
