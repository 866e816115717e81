"""TIES: trim, elect, disjoint merge (arXiv 2306.01708).

    1 trim    keep the entries of tau_i whose magnitude is >= its k-th largest,
              k = max(1, floor(density n)), n and k counted over the model or each tensor (`scope`)
    2 elect   gamma = sgn(sum_i w_i tau_i) (`mass`) or sgn(sum_i sgn(w_i tau_i)) (`count`);
              if that is 0, the sign of the sum of all elected signs in the scope
    3 merge   A = {i: sgn(w_i tau_i) = gamma}, zeros are in no A
              tau = sum_{i in A} w_i tau_i / sum_{i in A} abs(w_i),  theta = theta_0 + lambda tau

Differs from the paper in steps 2 and 3 by the weights, which it does not have; equal weights give
its plain mean. What other programs do is an option each: `keep` the k + 1 of the authors' program
or exactly k (of equal magnitudes the first), `votes` without weights, `undecided` entries as
positive, a `mean` over the count or no mean at all. An expert of weight 0 has no vote and does not
count, even if it does in other programs.

On a CPU sign, clamp and hardshrink run at the speed of memory, comparisons ten times slower: hence
the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from demerge.merging.method_options import Share
from demerge.merging.methods.linear import weighted_sum
from demerge.merging.methods.shared.selection import kth, magnitudes_at, share_of
from demerge.merging.registry import Block, Blocks, Statistic, method

Votes = Literal["weighted", "plain"]
Mean = Literal["weights", "count", "none"]
Undecided = Literal["majority", "plus"]


def trim(deltas: Tensor, threshold: Tensor, last: Tensor | None, start: int) -> list[Tensor]:
    """Return the deltas, K of [*], entries below their expert's threshold [K] set to 0.

    With `last` [K], entries at the threshold are set to 0, too, if they come after that index.
    """
    if last is not None:
        return trim_exactly(deltas, threshold, last, start)
    below = torch.nextafter(threshold, torch.zeros_like(threshold)).tolist()
    return [hardshrink(delta, bound) for delta, bound in zip(deltas, below, strict=True)]


def trim_exactly(deltas: Tensor, threshold: Tensor, last: Tensor, start: int) -> list[Tensor]:
    """Return `trim` with an index `last` [K]."""
    below = torch.nextafter(threshold, torch.zeros_like(threshold)).tolist()
    # so many of the first entries may be at the threshold
    room = (last + 1 - start).clamp(0, deltas[0].numel()).tolist()
    trimmed = []
    for delta, at, above, n in zip(deltas, below, threshold.tolist(), room, strict=True):
        flat = delta.reshape(-1)
        parts = [hardshrink(flat[:n], at), hardshrink(flat[n:], above)]
        trimmed.append(torch.cat(parts).view(delta.shape))
    return trimmed


def elect(deltas: Sequence[Tensor], weights: Tensor, how: str, votes: Votes = "weighted") -> Tensor:
    """Return gamma [*] in {-1, 0, 1} for deltas, K of [*], and weights [K].

    Equal weights are taken as 1, which rounds nothing. A plain vote counts 1, and 0 for an expert
    of weight 0.
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
    """Return tau [*], the mean of the entries of K deltas [*] that agree with the elected sign.

    It is 0 if none agrees.

    Args:
        majority: [], the sign if the votes are even.
        mean: over the weights or the count of those that agree, or their plain weighted sum.
    """
    sign = elect(deltas, weights, how, votes)
    if majority != 0:
        sign = sign + majority * (1 - sign.abs())
    total, mass = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        flips = votes == "weighted" and bool(weight < 0)
        agreeing = (delta * (-sign if flips else sign)).clamp_min_(0)
        total.addcmul_(agreeing, weight.abs() if votes == "weighted" else weight)
        share = weight.abs() if mean == "weights" else (weight != 0).to(weight)
        mass.addcmul_(agreeing.sign(), share)
    if mean == "none":
        return sign * total
    least = 1.0  # the mass is 0 or at least this
    if mean == "weights" and bool(weights.any()):
        least = float(weights.detach().abs()[weights != 0].min())
    return total.div_(mass.clamp_min_(least / 2)).mul_(sign)


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
    """Return the index [K] of the last entry at the threshold that is kept, so that k are."""
    return magnitudes_at(blocks, threshold, lambda n: share_of(density, n))


def trimmed_majority(
    blocks: Blocks, *, threshold: Tensor, last: Tensor | None, elect: str, votes: Votes
) -> Tensor:
    """Return the sign [] of the sum of all signs elected after trimming."""

    def elected(block: Block) -> Tensor:
        trimmed = trim(block.deltas, threshold, last, block.start)
        return _elect(trimmed, block.weights, elect, votes)

    return majority_sign(blocks, elected)


_elect = elect  # the name that the option `elect` hides


@method(
    "ties",
    paper="arXiv 2306.01708",
    statistics=(
        Statistic("threshold", thresholds, lambda o: o["scope"], uses_weights=False),
        Statistic(
            "last",
            last_kept,
            lambda o: o["scope"] if o["keep"] == "exact" else None,
            uses_weights=False,
        ),
        Statistic(
            "majority",
            trimmed_majority,
            lambda o: o["scope"] if o["undecided"] == "majority" else None,
        ),
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
    density: Share = 0.2,
    scope: Literal["model", "tensor"] = "model",
    keep: Literal["threshold", "exact", "authors"] = "threshold",
    elect: Literal["mass", "count"] = "mass",
    votes: Votes = "weighted",
    undecided: Undecided = "majority",
    mean: Mean = "weights",
    scale: float = 1.0,
) -> Tensor:
    """Keep the large entries of the task vectors, and average those that agree in sign [*].

    Weights are relative if the mean is over them: then only `scale` changes the length.

    Args:
        keep: entries at the threshold: all equal ones, exactly k, or the authors' k + 1
        elect: whether the sign is that of the sum of the entries or of the number of their signs
        votes: whether weights count in the votes
    """
    trimmed = trim(deltas, threshold, last, start)
    even = 1 if majority is None else majority
    return base + scale * disjoint_merge(trimmed, weights, elect, even, votes=votes, mean=mean)
