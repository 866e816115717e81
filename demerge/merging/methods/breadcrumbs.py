"""Model breadcrumbs: leave out the largest and the smallest entries of each tensor
(arXiv 2312.06795).

    tau_i' = the entries of tau_i whose magnitude has a rank in (t, t + k], 1 being the largest
    k = max(1, floor(density n)),  t = min(floor(gamma n), n - k), n entries in the tensor
    theta = theta_0 + lambda sum_i w_i tau_i'                               (then = linear; or ties)

Exactly k entries are kept: of equal magnitudes the first in the tensor has the smaller rank.
Differs from the paper, which keeps what lies between two quantiles, by counting; so tensors too
small for gamma n >= 1 lose no outlier, and none is left without an entry. Differs from the authors'
program, which ranks the entries of each row of the last axis; there is no preset for it.
`preset=mergekit` differs from mergekit for gamma n < 1, where mergekit's tensor is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from torch import Tensor

from demerge.merging.method_options import Between, Share
from demerge.merging.methods.shared.geometry import l1_factors
from demerge.merging.methods.shared.selection import kth, magnitudes_at, share_of
from demerge.merging.methods.shared.stages import (
    Then,
    aggregate,
    factor_scope,
    majority_of,
    majority_scope,
)
from demerge.merging.methods.ties import Mean, Undecided, trim_exactly
from demerge.merging.registry import Blocks, Statistic, method

End = tuple[Tensor, Tensor]  # of the largest entries of each task vector: threshold [K], index [K]
Trail = tuple[End, End]  # after t + k and after t entries


def trail(blocks: Blocks, *, density: float, gamma: float) -> Trail:
    """Return where the t + k and the t largest entries of each task vector end."""

    def end(rank: Callable[[int], int]) -> End:
        threshold = kth(blocks, lambda block: block.deltas, rank)
        return threshold, magnitudes_at(blocks, threshold, rank)

    return (
        end(lambda n: sum(counts(n, density, gamma))),
        end(lambda n: counts(n, density, gamma)[1]),
    )


def counts(n: int, density: float, gamma: float) -> tuple[int, int]:
    """Return k and t, how many of n entries are kept, and how many larger ones are not."""
    k = share_of(density, n)
    return k, min(math.floor(gamma * n), n - k)


def thin(deltas: Tensor, start: int, trail: Trail, factor: Tensor | None) -> list[Tensor]:
    """Return tau', K of [*], times factor [K] if there is one."""
    largest, outliers = (trim_exactly(deltas, *end, start) for end in trail)
    # an outlier is among the largest: x - x = 0
    thinned = [one - other for one, other in zip(largest, outliers, strict=True)]
    if factor is None:
        return thinned
    return [delta * float(f) for delta, f in zip(thinned, factor, strict=True)]


def factors(blocks: Blocks, *, weights: Tensor, trail: Trail) -> Tensor:
    """Return |tau_i|_1 / |tau_i'|_1 for each expert [K]."""
    return l1_factors(blocks, lambda b: thin(b.deltas, b.start, trail, None), len(weights))


def majority(blocks: Blocks, *, trail: Trail, factor: Tensor | None) -> Tensor:
    """Return the sign [] of the sum of all signs elected among the entries kept."""
    return majority_of(blocks, lambda block: thin(block.deltas, block.start, trail, factor))


@method(
    "breadcrumbs",
    paper="arXiv 2312.06795",
    statistics=(
        Statistic("trail", trail, uses_weights=False),
        Statistic("factor", factors, factor_scope, uses_weights=False),
        Statistic("majority", majority, majority_scope),
    ),
    presets={"mergekit": {"undecided": "plus", "mean": "none"}},
    neutral_options={"density": 1.0},
)
def breadcrumbs(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    start: int,
    trail: Trail,
    factor: Tensor | None,
    majority: Tensor | None,
    density: Share = 0.15,
    gamma: Annotated[float, Between(0, 1)] = 0.01,
    rescale: Literal["none", "l1"] = "none",
    then: Then = "linear",
    undecided: Undecided = "majority",
    mean: Mean = "weights",
    scale: float = 1.0,
) -> Tensor:
    """Leave out the largest and the smallest entries of the task vectors, and merge the rest [*].

    Args:
        gamma: share of the entries that are left out because they are the largest
    """
    thinned = thin(deltas, start, trail, factor)
    return aggregate(base, thinned, weights, then, majority, mean, scale)
