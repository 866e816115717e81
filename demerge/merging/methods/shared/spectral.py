"""Matrices in merging: thin SVD, polar factor and least squares by way of Gram matrices.

    M = U S V^T,    M M^T = U S^2 U^T,    V^T = S^-1 U^T M,    polar(M) = U V^T

The eigenvalues of the Gram matrix on the short side, in float64, are several times cheaper than a
singular value decomposition. They square the spectrum, though: what is below 2^-10 of the largest
singular value is taken from the Gram matrix of what remains of M, and so on. Singular values below
2^-23 of the largest are what rounding of float32 inputs leaves: they count as 0 and have no
singular vectors, so that nothing arbitrary shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from demerge.merging.methods.linear import weighted_sum

RESOLVED = 2.0**-10
ROUNDING = 2.0**-23


class SVD(NamedTuple):
    """U [m r], S [r] descending and positive, Vh [r n], with r the numerical rank."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a weight as a matrix: (out, in), a kernel as (out, in k k), a vector as one row."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)


def unit(tensor: Tensor) -> Tensor:
    """Return the largest magnitude [], or 1: divided by it, no square overflows or vanishes."""
    largest = tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())
    return torch.where(largest > 0, largest, 1.0)


def norm(matrix: Tensor) -> Tensor:
    """Return the Frobenius norm [] in float64, for entries of any scale."""
    length = unit(matrix).double()
    scaled: Tensor = matrix.double() / length
    return scaled.square().sum().sqrt() * length


def thin_svd(matrix: Tensor, rank: int | None = None, zero: Tensor | float = 0.0) -> SVD:
    """Return the leading `rank` singular triples of a matrix [m n], or all not 0, in float64.

    The signs of u_j and v_j are arbitrary together, as in any such decomposition.

    Args:
        zero: singular values up to this count as 0, too, if the matrix remains of a larger one.
    """
    if matrix.shape[0] > matrix.shape[1]:
        U, S, Vh = thin_svd(matrix.mT, rank, zero)
        return SVD(Vh.mT, S, U.mT)
    length = unit(matrix).double()
    wanted = min(matrix.shape) if rank is None else min(rank, *matrix.shape)
    U, S, Vh = _triples(matrix.double() / length, wanted, float(zero / length.detach()))
    return SVD(U, S * length, Vh)


def _triples(matrix: Tensor, wanted: int, smallest: float) -> SVD:
    """Return the leading triples above `smallest`: what one Gram matrix resolves, then more."""
    if wanted == 0:
        return SVD(matrix[:, :0], matrix.new_zeros(0), matrix[:0])
    squares, basis = torch.linalg.eigh(matrix @ matrix.mT)
    sigma, basis = squares.flip(0).clamp_min(0).sqrt(), basis.flip(1)
    head = min(wanted, int((sigma > max(smallest, RESOLVED * float(sigma[0].detach()))).sum()))
    U, others = basis[:, :head], basis[:, head:]
    rows = U.mT @ matrix
    S = rows.norm(dim=1)
    Vh = rows / S.unsqueeze(1)
    if not 0 < head < wanted:
        return SVD(U, S, Vh)
    smallest = max(smallest, ROUNDING * float(S[0].detach()))
    rows = others.mT @ matrix
    more = _triples(rows - rows @ Vh.mT @ Vh, wanted - head, smallest)
    return SVD(torch.cat([U, others @ more.U], 1), torch.cat([S, more.S]), torch.cat([Vh, more.Vh]))


def polar(matrix: Tensor) -> Tensor:
    """Return U V^T [m n], the nearest matrix with orthonormal rows or columns; 0 stays 0."""
    factor: Tensor = _Polar.apply(matrix)  # type: ignore[no-untyped-call]
    return factor


class _Polar(torch.autograd.Function):
    """The polar factor P; its own derivative, since that of equal eigenvectors is infinite.

    dL/dM = U ((X - X^T) / (s_i + s_j)) V^T + (I - U U^T) G V S^-1 V^T + U S^-1 U^T G (I - V V^T),
    G = dL/dP, X = U^T G V
    """

    @staticmethod
    def forward(context: Any, matrix: Tensor) -> Tensor:
        U, S, Vh = thin_svd(matrix)
        context.save_for_backward(U, S, Vh)
        return U @ Vh

    @staticmethod
    def backward(context: Any, G: Tensor) -> Tensor:
        U, S, Vh = context.saved_tensors
        X = U.mT @ G @ Vh.mT
        left, right = G @ Vh.mT - U @ X, U.mT @ G - X @ Vh
        inner: Tensor = U @ ((X - X.mT) / (S.unsqueeze(1) + S)) @ Vh
        gradient: Tensor = inner + left / S @ Vh + U @ (right / S.unsqueeze(1))
        return gradient


def solve(right: Tensor, gram: Tensor, rtol: float) -> Tensor:
    """Return right gram^+ [m n] for a symmetric gram [n n].

    Eigenvalues up to rtol times the largest count as 0. Cholesky if it can tell that there are
    none, else eigenvectors, which cost ten times as much.
    """
    L, failed = torch.linalg.cholesky_ex(gram)
    pivots = L.diagonal().square()
    if not failed and pivots.min() > rtol * pivots.max():
        return torch.cholesky_solve(right.mT, L).mT
    values, basis = torch.linalg.eigh(gram)
    kept = values.abs() > rtol * values.abs().max()
    Q: Tensor = basis[:, kept]
    coordinates: Tensor = right @ Q / values[kept]
    return coordinates @ Q.mT


def total(matrices: Sequence[Tensor], c: Tensor) -> Tensor:
    """Return sum_i c_i M_i [m n] in float64, of which one at a time is in memory."""
    summed = matrices[0].double() * c[0]
    for matrix, c_i in zip(matrices[1:], c[1:], strict=True):
        summed = torch.addcmul(summed, matrix.double(), c_i)
    return summed


def merge_matrices(
    base: Tensor,
    deltas: Tensor,
    weights: Tensor,
    scale: float,
    merge: Callable[[list[Tensor], Tensor], Tensor],
) -> Tensor:
    """Return theta_0 + scale merge(matrices, K of [m n], and c [K]) [*].

    c_i = w_i / max_j abs(w_j): weights are relative, equal ones give the sums of the papers, and
    `scale` is the length. Experts of weight 0 and those that did not change the tensor are left
    out. If one is left, its c_i tau_i is added. Vectors, and matrices of one row or column, are
    averaged as in the papers' programs: sum_i w_i tau_i / sum_i abs(w_i).
    """
    if min(as_matrix(base).shape) < 2:
        return base + scale * weighted_sum(deltas, weights / unit(weights.abs().sum()))
    c = weights / unit(weights)
    part = [i for i, delta in enumerate(deltas) if weights[i] != 0 and bool(delta.any())]
    if not part:
        return base.clone()
    if len(part) == 1:
        return base + scale * c[part[0]] * deltas[part[0]]
    tau = scale * merge([as_matrix(deltas[i]) for i in part], c[part].double())
    return base + tau.to(base.dtype).view_as(base)
