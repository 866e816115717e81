"""TIES: trim, elect, disjoint merge (arXiv 2306.01708).

    1 trim    keep the entries of tau_i whose magnitude is >= its k-th largest, k = max(1, floor(density n)), n and k
              counted over the whole model or each tensor (`scope`); entries equal to the threshold are all kept
    2 elect   gamma = sgn(sum_i w_i tau_i) (`mass`) or sgn(sum_i sgn(w_i tau_i)) (`count`); where that is 0, the sign of
              the sum of all elected signs in the scope
    3 merge   tau = sum_{i in A} w_i tau_i / sum_{i in A} abs(w_i), A = {i: sgn(w_i tau_i) = gamma}; zeros are in no A
              theta = theta_0 + lambda tau

Differs from the paper in step 3 by the weights, which it does not have; equal weights give its plain mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from demerge.merge.options import Between
from demerge.merge.registry import Block, Scope, Statistic, method

HALF = 1 << 16


def kth_magnitudes(blocks: Iterable[Block], *, density: float) -> Tensor:
    """Return for each expert the k-th largest magnitude of its delta [K], exactly, k = max(1, floor(density n)).

    Two passes of a radix histogram: the upper 16 bits of the float32 magnitudes find a bucket, the lower 16 the value
    in it.
    """
    upper = _histogram(blocks, lambda bits, i: bits >> 16)
    ranks = [max(1, math.floor(density * int(h.sum()))) for h in upper]
    buckets, ranks = _descend(upper, ranks)
    lower = _histogram(blocks, lambda bits, i: bits[(bits >> 16) == buckets[i]] & (HALF - 1))
    values, _ = _descend(lower, ranks)
    bits = [(bucket << 16) | value for bucket, value in zip(buckets, values, strict=True)]
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def _histogram(blocks: Iterable[Block], digit: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Count the digits [K 65536] that `digit(bits [n], expert)` finds in the bits of the magnitudes."""
    counts: Tensor | None = None
    for block in blocks:
        if counts is None:
            counts = torch.zeros(len(block.deltas), HALF, dtype=torch.int64)
        for i, delta in enumerate(block.deltas):
            bits = delta.float().abs().view(-1).view(torch.int32)
            counts[i] += torch.bincount(digit(bits, i), minlength=HALF)
    return torch.zeros(0, HALF, dtype=torch.int64) if counts is None else counts


def _descend(counts: Tensor, ranks: list[int]) -> tuple[list[int], list[int]]:
    """Return for each expert the digit of its rank-th largest element, and the rank left within that digit."""
    digits, left = [], []
    for count, rank in zip(counts, ranks, strict=True):
        above = count.flip(0).cumsum(0)
        position = int(torch.searchsorted(above, rank))
        digits.append(HALF - 1 - position)
        left.append(rank - int(above[position - 1]) if position else rank)
    return digits, left


def trim(deltas: Tensor, threshold: Tensor) -> Tensor:
    """Return the deltas [K *], entries of a magnitude below their expert's threshold [K] set to 0."""
    kept = deltas.float().abs() >= threshold.view(-1, *[1] * (deltas.ndim - 1))
    return torch.where(kept, deltas, 0)


def elect(votes: Tensor, how: str) -> Tensor:
    """Return gamma [*] in {-1, 0, 1} for the votes w_i tau_i [K *]."""
    return (votes if how == "mass" else votes.sign()).sum(0).sign()


def disjoint_merge(deltas: Tensor, weights: Tensor, how: str, majority: Tensor) -> Tensor:
    """Return tau [*], the weighted mean of the entries that agree with the elected sign; 0 where none does."""
    votes = deltas * weights.view(-1, *[1] * (deltas.ndim - 1))
    sign = elect(votes, how)
    sign = torch.where(sign == 0, majority.to(sign), sign)
    agree = votes * sign > 0
    total = torch.where(agree, votes, 0).sum(0)
    mass = torch.tensordot(weights.abs(), agree.to(weights.dtype), 1)
    return torch.where(mass > 0, total / mass, 0)


def majority_sign(deltas: Iterable[Tensor], weights: Tensor, how: str) -> Tensor:
    """Return the sign [] of the sum of all signs that chunks of deltas [K n] elect."""
    signs = (elect(chunk * weights.to(chunk.dtype).unsqueeze(1), how).sum(dtype=torch.float64) for chunk in deltas)
    return sum(signs, torch.zeros((), dtype=torch.float64)).sign()


def trimmed_majority(blocks: Iterable[Block], *, weights: Tensor, elect: str, threshold: Tensor) -> Tensor:
    """Return the sign [] of the sum of all signs elected after trimming."""
    return majority_sign((trim(block.deltas, threshold) for block in blocks), weights, elect)


def _scope(options: Mapping[str, Any]) -> Scope:
    scope: Scope = options["scope"]
    return scope


@method(
    "ties",
    paper="arXiv 2306.01708",
    statistics=(Statistic("threshold", kth_magnitudes, _scope), Statistic("majority", trimmed_majority, _scope)),
    off={"density": 1.0},
)
def ties(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    threshold: Tensor,
    majority: Tensor,
    density: Annotated[float, Between(0, 1, open_low=True)] = 0.2,
    scope: Literal["model", "tensor"] = "model",
    elect: Literal["mass", "count"] = "mass",
    scale: float = 1.0,
) -> Tensor:
    """Return the base plus `scale` (lambda) times the disjoint mean of the trimmed task vectors [*].

    Weights are relative: only `scale` changes the length of the merged task vector.
    """
    return base + scale * disjoint_merge(trim(deltas, threshold), weights, elect, majority)
