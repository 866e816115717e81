"""Model breadcrumbs: leave out the largest and the smallest entries of each tensor (arXiv 2312.06795).

    tau_i' = the entries of tau_i whose magnitude has a rank in (t, t + k], 1 being the largest of the tensor's n
    k = max(1, floor(density n)),  t = min(floor(gamma n), n - k)
    theta = theta_0 + lambda sum_i w_i tau_i'                                        (then = linear; or ties)

Exactly k entries are kept: of equal magnitudes the first in the tensor has the smaller rank. Differs from the paper,
which keeps what lies between two quantiles, by counting; so tensors too small for gamma n >= 1 lose no outlier, and none
is left without an entry. Differs from the authors' program, which ranks the entries of each row of the last axis by
themselves; there is no preset for it. `preset=mergekit` differs from mergekit for gamma n < 1, where mergekit's tensor is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from demerge.merging.method_options import Between
from demerge.merging.methods.selection import kth, magnitudes_at, share_of
from demerge.merging.methods.stages import Then, aggregate, majority_of, majority_scope
from demerge.merging.methods.statistics import l1_factors
from demerge.merging.methods.ties import Mean, trim_exactly
from demerge.merging.registry import Blocks, Scope, Statistic, method


@dataclass(frozen=True, slots=True)
class Cut:
    """The r largest entries of each task vector: those above `threshold` [K], and those at it up to index `last` [K]."""

    threshold: Tensor
    last: Tensor

    def largest(self, deltas: Tensor, start: int) -> list[Tensor]:
        """Return the r largest entries of the deltas, K of [*], the others set to 0."""
        return trim_exactly(deltas, self.threshold, self.last, start)


@dataclass(frozen=True, slots=True)
class Trail:
    """Two cuts: the entries of the `wide` one without those of the `narrow` one."""

    wide: Cut
    narrow: Cut

    def between(self, deltas: Tensor, start: int) -> list[Tensor]:
        """Return the entries of the deltas between the cuts, K of [*], the others set to 0."""
        pairs = zip(
            self.wide.largest(deltas, start), self.narrow.largest(deltas, start), strict=True
        )
        return [
            kept - outlier for kept, outlier in pairs
        ]  # an outlier is among the kept: x - x = 0


def cut(blocks: Blocks, rank: Callable[[int], int]) -> Cut:
    """Return where the rank(n) largest entries of each task vector end."""
    threshold = kth(blocks, lambda block: block.deltas, rank)
    return Cut(threshold, magnitudes_at(blocks, threshold, rank))


def trail(blocks: Blocks, *, density: float, gamma: float) -> Trail:
    """Return the two cuts, after t + k and after t entries."""
    return Trail(
        cut(blocks, lambda n: sum(counts(n, density, gamma))),
        cut(blocks, lambda n: counts(n, density, gamma)[1]),
    )


def counts(n: int, density: float, gamma: float) -> tuple[int, int]:
    """Return k and t, how many of n entries are kept, and how many larger ones are not."""
    k = share_of(density, n)
    return k, min(math.floor(gamma * n), n - k)


def factors(blocks: Blocks, *, weights: Tensor, trail: Trail) -> Tensor:
    """Return |tau_i|_1 / |tau_i'|_1 for each expert [K]."""
    return l1_factors(
        blocks, lambda block: trail.between(block.deltas, block.start), weights=weights
    )


def majority(blocks: Blocks, *, trail: Trail, factor: Tensor | None) -> Tensor:
    """Return the sign [] of the sum of all signs elected among the entries kept."""
    return majority_of(blocks, lambda block: thinned(block.deltas, block.start, trail, factor))


def thinned(deltas: Tensor, start: int, trail: Trail, factor: Tensor | None) -> list[Tensor]:
    """Return tau', K of [*], times factor [K] where there is one."""
    kept = trail.between(deltas, start)
    return (
        kept
        if factor is None
        else [entries * float(f) for entries, f in zip(kept, factor, strict=True)]
    )


def _scope(options: Mapping[str, Any]) -> Scope:
    return "tensor"


def _factor_scope(options: Mapping[str, Any]) -> Scope | None:
    return "tensor" if options["rescale"] == "l1" else None


@method(
    "breadcrumbs",
    paper="arXiv 2312.06795",
    statistics=(
        Statistic("trail", trail, _scope, uses_weights=False),
        Statistic("factor", factors, _factor_scope, uses_weights=False),
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
    density: Annotated[float, Between(0, 1, open_low=True)] = 0.15,
    gamma: Annotated[float, Between(0, 1)] = 0.01,
    rescale: Literal["none", "l1"] = "none",
    then: Then = "linear",
    undecided: Literal["majority", "plus"] = "majority",
    mean: Mean = "weights",
    scale: float = 1.0,
) -> Tensor:
    """Return the base plus `scale` (lambda) times the merge of task vectors without their largest and smallest entries [*].

    `gamma` is the share of outliers. `undecided` and `mean` are those of ties and matter where `then` is ties.
    """
    return aggregate(
        base, thinned(deltas, start, trail, factor), weights, then, majority, mean, scale
    )
