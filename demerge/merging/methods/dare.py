"""DARE: drop and rescale (arXiv 2311.03099), then a linear or a TIES merge.

    m_i ~ Bernoulli(density)
    tau_i' = m_i tau_i / density                                          (rescale = paper)
    tau_i' = m_i tau_i |tau_i|_1 / |m_i tau_i|_1 of the tensor            (rescale = l1, as mergekit)
    tau_i' = m_i tau_i                                                    (rescale = none)
    theta = theta_0 + lambda sum_i w_i tau_i'                             (then = linear)
    theta = theta_0 + lambda disjoint_merge(tau'), signs by mass          (then = ties, without its trimming)

The masks depend on (seed, expert, tensor name, index) alone: m_i = [uniform < density].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from torch import Tensor

from demerge.merging.method_options import Between
from demerge.merging.methods.stages import Then, aggregate, majority_of, majority_scope
from demerge.merging.methods.statistics import l1_factors
from demerge.merging.methods.ties import Mean
from demerge.merging.registry import Block, Blocks, Scope, Statistic, method


def kept(uniform: Tensor, density: float | Tensor) -> Tensor:
    """Return the mask m [*] in {0, 1}: 1 where uniform < density.

    ceil(density - uniform) is that, since both lie in [0, 1]; it is several times faster than a comparison.
    """
    return (density - uniform).ceil_()


def rescales(blocks: Blocks, *, weights: Tensor, density: float) -> Tensor:
    """Return |tau_i|_1 / |m_i tau_i|_1 for each expert [K]; 1 where nothing but zeros was kept."""
    return l1_factors(
        blocks, lambda block: drop(block.deltas, _uniform(block), density), weights=weights
    )


def drop(deltas: Tensor, uniform: Tensor, density: float) -> list[Tensor]:
    """Return m_i tau_i, K of [*]."""
    return [
        delta * mask
        for delta, mask in zip(deltas, kept(uniform, density).to(deltas.dtype), strict=True)
    ]


def thinned(
    deltas: Tensor, uniform: Tensor, density: float, factor: Tensor | None, rescale: str
) -> list[Tensor]:
    """Return tau_i', K of [*]."""
    dropped = drop(deltas, uniform, density)
    if factor is not None:
        return [delta.mul_(float(f)) for delta, f in zip(dropped, factor, strict=True)]
    return dropped if rescale == "none" else [delta.mul_(1 / density) for delta in dropped]


def dropped_majority(
    blocks: Blocks, *, density: float, factor: Tensor | None, rescale: str
) -> Tensor:
    """Return the sign [] of the sum of all signs elected after dropping."""
    return majority_of(
        blocks, lambda block: thinned(block.deltas, _uniform(block), density, factor, rescale)
    )


def _uniform(block: Block) -> Tensor:
    uniform = block.inputs["uniform"]
    assert uniform is not None
    return uniform


def _l1_scope(options: Mapping[str, Any]) -> Scope | None:
    return "tensor" if options["rescale"] == "l1" else None


@method(
    "dare",
    paper="arXiv 2311.03099",
    statistics=(
        Statistic("factor", rescales, _l1_scope, uses_weights=False),
        Statistic("majority", dropped_majority, majority_scope),
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
    density: Annotated[float, Between(0, 1, open_low=True)] = 0.5,
    rescale: Literal["paper", "l1", "none"] = "paper",
    then: Then = "linear",
    undecided: Literal["majority", "plus"] = "majority",
    mean: Mean = "weights",
    scale: float = 1.0,
) -> Tensor:
    """Return the base plus `scale` (lambda) times the merge of randomly thinned task vectors [*].

    `undecided` and `mean` are those of ties and matter where `then` is ties.
    """
    return aggregate(
        base,
        thinned(deltas, uniform, density, factor, rescale),
        weights,
        then,
        majority,
        mean,
        scale,
    )
