"""TIES: trim, elect, disjoint merge (arXiv 2306.01708).

    1 trim    keep the entries of tau_i whose magnitude is >= its k-th largest, k = max(1, floor(density n)), n and k
              counted over the whole model or each tensor (`scope`)
    2 elect   gamma = sgn(sum_i w_i tau_i) (`mass`) or sgn(sum_i sgn(w_i tau_i)) (`count`); where that is 0, the sign of
              the sum of all elected signs in the scope
    3 merge   tau = sum_{i in A} w_i tau_i / sum_{i in A} abs(w_i), A = {i: sgn(w_i tau_i) = gamma}; zeros are in no A
              theta = theta_0 + lambda tau

Differs from the paper in steps 2 and 3 by the weights, which it does not have; equal weights give its plain mean. What
other programs do is an option each: `keep` the k + 1 of the authors' program or exactly k (of equal magnitudes the
first), `votes` without weights, `undecided` entries as positive, a `mean` over the count or no mean at all. An expert of
weight 0 has no vote and does not count, also where it has in other programs.

On a CPU sign, clamp and hardshrink run at the speed of memory, comparisons ten times slower: hence the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from demerge.merging.method_options import Between
from demerge.merging.methods.linear import weighted_sum
from demerge.merging.methods.selection import kth, magnitudes_at, share_of
from demerge.merging.registry import Block, Blocks, Scope, Statistic, method

Votes = Literal["weighted", "plain"]
Mean = Literal["weights", "count", "none"]


def trim(deltas: Tensor, threshold: Tensor) -> list[Tensor]:
    """Return the deltas, K of [*], entries of a magnitude below their expert's threshold [K] set to 0."""
    below = torch.nextafter(threshold, torch.zeros_like(threshold)).tolist()
    return [hardshrink(delta, bound) for delta, bound in zip(deltas, below, strict=True)]


def trim_exactly(deltas: Tensor, threshold: Tensor, last: Tensor, start: int) -> list[Tensor]:
    """Return `trim(deltas, threshold)` without the entries at the threshold that come after index `last` [K]."""
    below = torch.nextafter(threshold, torch.zeros_like(threshold)).tolist()
    room = (
        (last + 1 - start).clamp(0, deltas[0].numel()).tolist()
    )  # so many entries may be at the threshold
    bounds = zip(deltas, below, threshold.tolist(), room, strict=True)
    return [_shrunk_in_two(delta, at, above, n) for delta, at, above, n in bounds]


def _shrunk_in_two(delta: Tensor, first: float, second: float, n: int) -> Tensor:
    """Return the hardshrink of the first n entries at one bound, of the others at another."""
    flat = delta.reshape(-1)
    return torch.cat([hardshrink(flat[:n], first), hardshrink(flat[n:], second)]).view(delta.shape)


def elect(deltas: Sequence[Tensor], weights: Tensor, how: str, votes: Votes = "weighted") -> Tensor:
    """Return gamma [*] in {-1, 0, 1} for deltas, K of [*], and weights [K]; equal weights are 1, which rounds nothing.

    A plain vote counts 1, and 0 for an expert of weight 0.
    """
    equal = votes == "plain" or bool((weights == weights[0]).all() & (weights[0] > 0))
    counted = (weights != 0).to(weights) if equal else weights
    if how == "mass":
        return weighted_sum(deltas, counted).sign()
    return weighted_sum([delta.sign() for delta in deltas], counted.sign()).sign()


def disjoint_merge(
    deltas: Sequence[Tensor],
    weights: Tensor,
    how: str,
    majority: Tensor | float,
    *,
    votes: Votes = "weighted",
    mean: Mean = "weights",
) -> Tensor:
    """Return tau [*], the mean of the entries of K deltas [*] that agree with the elected sign; 0 where none does.

    Args:
        majority: [], the sign where the votes are even.
        mean: over the weights or the count of those that agree, or their plain weighted sum.
    """
    sign = elect(deltas, weights, how, votes)
    if majority != 0:
        sign = sign + majority * (1 - sign.abs())
    total, mass, one = torch.zeros_like(sign), torch.zeros_like(sign), torch.ones_like(weights[0])
    for delta, weight in zip(deltas, weights, strict=True):
        flips = votes == "weighted" and bool(weight < 0)
        agreeing = (delta * (-sign if flips else sign)).clamp_min_(0)
        total.addcmul_(agreeing, weight.abs() if votes == "weighted" else weight)
        mass.addcmul_(
            agreeing.sign(), weight.abs() if mean == "weights" else (weight != 0).to(weight)
        )
    if mean == "none":
        return sign * total
    least = (
        weights.detach().abs()[weights != 0].min()
        if mean == "weights" and bool(weights.any())
        else one
    )
    return total.div_(mass.clamp_min_(float(least) / 2)).mul_(
        sign
    )  # the mass is 0 or at least `least`


def majority_sign(blocks: Blocks, elected: Callable[[Block], Tensor]) -> Tensor:
    """Return the sign [] of the sum of the signs that are elected in all blocks."""
    return blocks.total(lambda block: balance(elected(block))).sign()


def balance(signs: Tensor) -> Tensor:
    """Return how many more of the signs [*] are positive than negative, []."""
    return signs.detach().sum().double().cpu()


def thresholds(blocks: Blocks, *, density: float, keep: str) -> Tensor:
    """Return the magnitude [K] from which on entries are kept."""
    more = 1 if keep == "authors" else 0
    return kth(blocks, lambda block: block.deltas, lambda n: max(1, math.floor(density * n) + more))


def last_kept(blocks: Blocks, *, density: float, threshold: Tensor) -> Tensor:
    """Return the index [K] of the last entry at the threshold that is kept, so that exactly k are."""
    return magnitudes_at(blocks, threshold, lambda n: share_of(density, n))


def trimmed_majority(
    blocks: Blocks, *, threshold: Tensor, last: Tensor | None, elect: str, votes: Votes
) -> Tensor:
    """Return the sign [] of the sum of all signs elected after trimming."""
    return majority_sign(
        blocks, lambda b: _elected(_trimmed(b.deltas, threshold, last, b.start), b, elect, votes)
    )


def _elected(trimmed: list[Tensor], block: Block, how: str, votes: Votes) -> Tensor:
    return elect(trimmed, block.weights, how, votes)


def _trimmed(deltas: Tensor, threshold: Tensor, last: Tensor | None, start: int) -> list[Tensor]:
    return trim(deltas, threshold) if last is None else trim_exactly(deltas, threshold, last, start)


def _scope(options: Mapping[str, Any]) -> Scope:
    scope: Scope = options["scope"]
    return scope


def _exact_scope(options: Mapping[str, Any]) -> Scope | None:
    return _scope(options) if options["keep"] == "exact" else None


def _majority_scope(options: Mapping[str, Any]) -> Scope | None:
    return _scope(options) if options["undecided"] == "majority" else None


@method(
    "ties",
    paper="arXiv 2306.01708",
    statistics=(
        Statistic("threshold", thresholds, _scope, uses_weights=False),
        Statistic("last", last_kept, _exact_scope, uses_weights=False),
        Statistic("majority", trimmed_majority, _majority_scope),
    ),
    presets={
        "authors": {"keep": "authors", "votes": "plain"},
        "mergekit": {"scope": "tensor", "keep": "exact", "undecided": "plus"},
        "peft": {
            "scope": "tensor",
            "keep": "exact",
            "undecided": "plus",
            "votes": "plain",
            "mean": "count",
        },
    },
    neutral_options={"density": 1.0},
)
def ties(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    threshold: Tensor,
    last: Tensor | None,
    majority: Tensor | None,
    start: int,
    density: Annotated[float, Between(0, 1, open_low=True)] = 0.2,
    scope: Literal["model", "tensor"] = "model",
    keep: Literal["threshold", "exact", "authors"] = "threshold",
    elect: Literal["mass", "count"] = "mass",
    votes: Votes = "weighted",
    undecided: Literal["majority", "plus"] = "majority",
    mean: Mean = "weights",
    scale: float = 1.0,
) -> Tensor:
    """Return the base plus `scale` (lambda) times the disjoint mean of the trimmed task vectors [*].

    Weights are relative where the mean is over them: then only `scale` changes the length of the merged task vector.
    """
    trimmed = _trimmed(deltas, threshold, last, start)
    tau = disjoint_merge(
        trimmed, weights, elect, 1 if majority is None else majority, votes=votes, mean=mean
    )
    return base + scale * tau
