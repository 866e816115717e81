"""The last stage of the methods that thin task vectors first (dare, della, breadcrumbs).

    theta = theta_0 + lambda sum_i w_i tau_i'                     (then = linear)
    theta = theta_0 + lambda disjoint_merge(tau')                 (then = ties)

where ties elects the signs by mass and does not trim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

from demerge.merging.methods.linear import weighted_sum
from demerge.merging.methods.ties import Mean, disjoint_merge, elect, majority_sign
from demerge.merging.registry import Block, Blocks, Scope

Then = Literal["linear", "ties"]


def aggregate(
    base: Tensor,
    thinned: list[Tensor],
    weights: Tensor,
    then: Then,
    majority: Tensor | None,
    mean: Mean,
    scale: float,
) -> Tensor:
    """Return a base merged with K thinned task vectors [*]; no majority means positive."""
    if then == "linear":
        return base + weighted_sum(thinned, scale * weights)
    even = 1 if majority is None else majority
    return base + scale * disjoint_merge(thinned, weights, "mass", even, mean=mean)


def majority_of(blocks: Blocks, thinned: Callable[[Block], list[Tensor]]) -> Tensor:
    """Return the sign [] of the sum of all signs that the thinned task vectors elect."""
    return majority_sign(blocks, lambda block: elect(thinned(block), block.weights, "mass"))


def majority_scope(options: Mapping[str, Any]) -> Scope | None:
    """Return where the majority is counted: over the tensor, if the options need it."""
    return "tensor" if options["then"] == "ties" and options["undecided"] == "majority" else None


def factor_scope(options: Mapping[str, Any]) -> Scope | None:
    """Return where 1-norms are summed: over the tensor, if the options need them."""
    return "tensor" if options["rescale"] == "l1" else None
