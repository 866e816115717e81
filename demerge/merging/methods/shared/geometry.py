"""The geometry of whole task vectors, for several methods: Gram matrix, cosines, 1-norms.

    G_ij = tau_i . tau_j        c_ij = G_ij / (|tau_i| |tau_j|)

Lengths, angles and everything in the span of the task vectors follow from G, so one pass over the
blocks is enough. Sums are float64, over blocks of a fixed size and in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from demerge.merging.registry import Block, Blocks

PIECE = 1 << 18  # entries of a whole tensor that are held in float64 at once


def gram(blocks: Blocks, *, weights: Tensor) -> Tensor:
    """Return G [K K] in float64; `weights` [K] only tell how many experts there are."""
    K = len(weights)
    zero = torch.zeros(K, K, dtype=torch.float64, device=weights.device)
    return summed(blocks, lambda block: row_grams(block.deltas.reshape(K, 1, -1))[0], zero)


def row_grams(deltas: Tensor) -> Tensor:
    """Return the Gram matrix of each row, [R K K] in float64, of deltas [K R n]."""
    K, R, n = deltas.shape
    total = torch.zeros(R, K, K, dtype=torch.float64, device=deltas.device)
    rows, columns = max(1, PIECE // max(1, n)), min(max(1, n), PIECE)
    for first in range(0, R, rows):
        for part in deltas[:, first : first + rows].split(columns, dim=2):
            wide = part.transpose(0, 1).double()
            total[first : first + rows] += wide @ wide.mT
    return total


def norms(gram: Tensor) -> Tensor:
    """Return |tau_i| [... K] for Gram matrices [... K K]."""
    return gram.diagonal(dim1=-2, dim2=-1).sqrt()


def cosines(gram: Tensor) -> Tensor:
    """Return c [... K K] for Gram matrices [... K K]; those of a task vector of 0 are 0."""
    length = norms(gram)
    product = length.unsqueeze(-1) * length.unsqueeze(-2)
    return (gram / torch.where(product > 0, product, 1.0)).clamp(-1, 1)


def l1_factors(blocks: Blocks, thinned: Callable[[Block], list[Tensor]], K: int) -> Tensor:
    """Return |tau_i|_1 / |tau_i'|_1 for each expert [K], tau' being thinned; 1 if it is 0."""

    def both_norms(block: Block) -> Tensor:
        return torch.stack([l1_norms(block.deltas), l1_norms(thinned(block))]).cpu()

    before, after = summed(blocks, both_norms, torch.zeros(2, K, dtype=torch.float64))
    return norm_ratio(before, after)


def norm_ratio(before: Tensor, after: Tensor) -> Tensor:
    """Return before / after for norms in float64; 1 if after is 0.

    At most the largest float32: with an infinite factor an entry of 0 would become NaN.
    """
    ratio = torch.where(after > 0, before / torch.where(after > 0, after, 1.0), 1.0)
    return ratio.clamp(max=torch.finfo(torch.float32).max)


def l1_norms(deltas: Tensor | list[Tensor]) -> Tensor:
    """Return the 1-norms [K] of K deltas [*], in float64."""
    return torch.stack([delta.abs().sum(dtype=torch.float64) for delta in deltas])


def summed(blocks: Blocks, term: Callable[[Block], Tensor], zero: Tensor) -> Tensor:
    """Return zero + the sum of term(block) over all blocks, in their order."""
    total = zero
    for value in blocks.map(term):
        total = total + value
    return total


def with_a_say(deltas: Tensor, weights: Tensor) -> Tensor:
    """Return the deltas [K' *] of experts of a weight [K] other than 0; all if none has one."""
    return deltas if bool(weights.all()) or not bool(weights.any()) else deltas[weights != 0]


def relative(weights: Tensor) -> Tensor:
    """Return w_i / max_j abs(w_j) [K]: equal weights are 1 each; zeros stay zeros.

    For methods whose paper has no weights: equal ones give its formula.
    """
    most = weights.abs().amax()
    return weights / torch.where(most > 0, most, 1.0)
