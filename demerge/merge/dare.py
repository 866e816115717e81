"""DARE: drop and rescale (arXiv 2311.03099), then a linear or a TIES merge.

    m_i ~ Bernoulli(density)
    tau_i' = m_i tau_i / density                                          (rescale = paper)
    tau_i' = m_i tau_i |tau_i|_1 / |m_i tau_i|_1 of the tensor            (rescale = l1, as mergekit)
    theta = theta_0 + lambda sum_i w_i tau_i'                             (then = linear)
    theta = theta_0 + lambda disjoint_merge(tau'), signs by mass          (then = ties, without its trimming)

The masks depend on (seed, expert, tensor name, index) alone: m_i = [uniform < density].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from demerge.merge.linear import weighted_sum
from demerge.merge.options import Between
from demerge.merge.registry import Block, Scope, Statistic, method
from demerge.merge.ties import disjoint_merge, majority_sign


def l1_factors(blocks: Iterable[Block], *, density: float) -> Tensor:
    """Return |tau_i|_1 / |m_i tau_i|_1 for each expert [K]; 1 where nothing but zeros was kept."""
    norms = torch.stack([torch.stack(_l1_norms(b.deltas, b.inputs["uniform"], density)) for b in blocks]).sum(0)
    return torch.where(norms[1] > 0, norms[0] / norms[1], 1.0)


def _l1_norms(deltas: Tensor, uniform: Tensor, density: float) -> list[Tensor]:
    magnitudes = deltas.abs().double()
    return [magnitudes.sum(1), torch.where(uniform < density, magnitudes, 0).sum(1)]


def drop(deltas: Tensor, uniform: Tensor, density: float, factor: Tensor | None) -> Tensor:
    """Return m_i tau_i [K *], rescaled by 1/density or by factor [K]."""
    kept = torch.where(uniform < density, deltas, 0)
    if factor is None:
        return kept / density
    return (kept * factor.view(-1, *[1] * (deltas.ndim - 1))).to(deltas.dtype)


def dropped_majority(blocks: Iterable[Block], *, weights: Tensor, density: float, factor: Tensor | None) -> Tensor:
    """Return the sign [] of the sum of all signs elected after dropping; factors are positive and may be per tensor."""
    dropped = (drop(b.deltas, b.inputs["uniform"], density, factor) for b in blocks)
    return majority_sign(dropped, weights, "mass")


def _l1_scope(options: Mapping[str, Any]) -> Scope | None:
    return "tensor" if options["rescale"] == "l1" else None


def _ties_scope(options: Mapping[str, Any]) -> Scope | None:
    return "tensor" if options["then"] == "ties" else None


@method(
    "dare",
    paper="arXiv 2311.03099",
    statistics=(Statistic("factor", l1_factors, _l1_scope), Statistic("majority", dropped_majority, _ties_scope)),
    off={"density": 1.0},
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
    rescale: Literal["paper", "l1"] = "paper",
    then: Literal["linear", "ties"] = "linear",
    scale: float = 1.0,
) -> Tensor:
    """Return the base plus `scale` (lambda) times the merge of randomly thinned task vectors [*]."""
    thinned = drop(deltas, uniform, density, factor)
    if majority is None:
        return base + weighted_sum(thinned, scale * weights)
    return base + scale * disjoint_merge(thinned, weights, "mass", majority)
