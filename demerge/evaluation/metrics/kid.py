"""KID: the kernel distance between two sets of features, unbiased for any number of images.

    k(x, y) = (x.y / D + 1)^3
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i,j} k(x_i, y_j)

Both sets are put in a random order and split into blocks of equal size. The result is the mean over
pairs of blocks, its standard error that of independent blocks. An unbiased estimate of a distance
near zero can be negative.

Paper: Demystifying MMD GANs (arXiv 1801.01401). Differs from its 100 random subsets of 1000, which
overlap and so give no standard error: the blocks here are disjoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from demerge.errors import UsageError
from demerge.randomness import permutation

BLOCK = 500


@dataclass(frozen=True, slots=True)
class Kid:
    """KID with its standard error over blocks (NaN with a single block)."""

    value: float
    error: float
    blocks: int


def mmd2(x: Tensor, y: Tensor) -> float:
    """Return the unbiased squared MMD of x [n D] and y [m D] under the cubic kernel, in float64."""
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        what = f"features {list(x.shape)} and {list(y.shape)} do not compare"
        raise UsageError(what, fix="give [n D] and [m D] with n, m >= 2")
    x, y = x.double(), y.double()
    return float(_mean_of_others(x) + _mean_of_others(y) - 2 * _kernel(x, y).mean())


def kid(x: Tensor, y: Tensor, *, block: int = BLOCK, seed: int = 0) -> Kid:
    """Return KID between features x [n D] and y [m D]; `block` is the most rows of a block."""
    size = min(block, len(x), len(y))
    count = min(len(x), len(y)) // max(1, size)
    pieces = [z[permutation(len(z), seed, "kid", side)] for side, z in enumerate((x, y))]
    blocks = [slice(i * size, (i + 1) * size) for i in range(max(1, count))]
    distances = [mmd2(pieces[0][rows], pieces[1][rows]) for rows in blocks]
    values = torch.tensor(distances, dtype=torch.float64)
    error = float(values.std() / count**0.5) if count > 1 else float("nan")
    return Kid(float(values.mean()), error, count)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_others(x: Tensor) -> Tensor:
    """Return the mean of k(x_i, x_j) over i != j."""
    diagonal = (x.square().sum(1) / x.shape[1] + 1) ** 3
    return (_kernel(x, x).sum() - diagonal.sum()) / (len(x) * (len(x) - 1))
