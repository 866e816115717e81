"""DARE: drop and rescale (arXiv 2311.03099), then a linear or a TIES merge.

    m_i ~ Bernoulli(density)
    tau_i' = m_i tau_i / density                                         (rescale = paper)
    tau_i' = m_i tau_i |tau_i|_1 / |m_i tau_i|_1 of the tensor           (rescale = l1, as mergekit)
    tau_i' = m_i tau_i                                                   (rescale = none)
    theta = theta_0 + lambda sum_i w_i tau_i'                            (then = linear)
    theta = theta_0 + lambda disjoint_merge(tau'), signs by mass         (then = ties, no trimming)

The masks depend on (seed, expert, tensor name, index) alone: m_i = [uniform < density].
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from demerge.merging.method_options import Share
from demerge.merging.methods.shared.geometry import l1_factors
from demerge.merging.methods.shared.stages import (
    Then,
    aggregate,
    factor_scope,
    majority_of,
    majority_scope,
)
from demerge.merging.methods.ties import Mean, Undecided
from demerge.merging.registry import Blocks, Statistic, method


def keep_mask(uniform: Tensor, density: float | Tensor) -> Tensor:
    """Return the mask m [*] in {0, 1}: 1 if uniform < density.

    ceil(density - uniform) is that, since both lie in [0, 1]; it is faster than a comparison.
    """
    return (density - uniform).ceil_()


def drop(deltas: Tensor, uniform: Tensor, density: float) -> list[Tensor]:
    """Return m_i tau_i, K of [*]."""
    masks = keep_mask(uniform, density).to(deltas.dtype)
    return [delta * mask for delta, mask in zip(deltas, masks, strict=True)]


def thin(
    deltas: Tensor, uniform: Tensor, density: float, factor: Tensor | None, rescale: str
) -> list[Tensor]:
    """Return tau_i', K of [*]."""
    dropped = drop(deltas, uniform, density)
    if factor is not None:
        return [delta.mul_(float(f)) for delta, f in zip(dropped, factor, strict=True)]
    return dropped if rescale == "none" else [delta.mul_(1 / density) for delta in dropped]


def factors(blocks: Blocks, *, weights: Tensor, density: float) -> Tensor:
    """Return |tau_i|_1 / |m_i tau_i|_1 for each expert [K]; 1 if nothing but zeros was kept."""
    return l1_factors(
        blocks, lambda block: drop(block.deltas, block.input("uniform"), density), len(weights)
    )


def majority(blocks: Blocks, *, density: float, factor: Tensor | None, rescale: str) -> Tensor:
    """Return the sign [] of the sum of all signs elected after dropping."""
    return majority_of(
        blocks, lambda b: thin(b.deltas, b.input("uniform"), density, factor, rescale)
    )


@method(
    "dare",
    paper="arXiv 2311.03099",
    statistics=(
        Statistic("factor", factors, factor_scope, uses_weights=False),
        Statistic("majority", majority, majority_scope),
    ),
    presets={
        "authors": {},
        "mergekit": {"rescale": "l1", "undecided": "plus", "mean": "none"},
        "peft": {"undecided": "plus", "mean": "count"},
    },
    neutral_options={"density": 1.0},
)
def dare(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    uniform: Tensor,
    factor: Tensor | None,
    majority: Tensor | None,
    density: Share = 0.5,
    rescale: Literal["paper", "l1", "none"] = "paper",
    then: Then = "linear",
    undecided: Undecided = "majority",
    mean: Mean = "weights",
    scale: float = 1.0,
) -> Tensor:
    """Drop random entries of the task vectors, rescale the rest, and merge [*].

    Args:
        density: chance of an entry to be kept
    """
    thinned = thin(deltas, uniform, density, factor, rescale)
    return aggregate(base, thinned, weights, then, majority, mean, scale)
