"""SCE: select, calculate, erase (FuseChat 3.0, arXiv 2408.07990).

    1 select     in each tensor keep the entries where the experts differ most: the variance of tau_1 .. tau_K is >=
                 its k-th largest, k = max(1, floor(density m)), m entries having one other than 0
    2 calculate  e_i = |tau_i|^2 over what is kept of the tensor
    3 erase      gamma = sgn(sum_i w_i tau_i), positive where that is 0; A = {i: sgn(w_i tau_i) = gamma}
                 tau = sum_{i in A} e_i w_i tau_i / sum_{i in A} e_i abs(w_i),  theta = theta_0 + lambda tau

Entries of equal variance at the threshold are all kept. Where no entry of a tensor differs between the experts, as with
one expert, there is nothing to select by and all are kept. Differs from the paper by the weights, which it does not have.
Squares are taken in float64: those of small deltas are 0 in half precision. An expert of weight 0 has no say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from demerge.merging.method_options import Between
from demerge.merging.methods.linear import weighted_sum
from demerge.merging.methods.selection import kth, share_of
from demerge.merging.methods.statistics import summed, with_a_say
from demerge.merging.registry import Block, Blocks, Scope, Statistic, method


def spread(deltas: Tensor) -> Tensor:
    """Return K times the variance over the experts [*], in float64; exactly 0 where they are equal.

    Taken of the differences to the first expert, whose squares are at most K times the result: nothing cancels.
    """
    first = deltas[0].double()
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for delta in deltas[1:]:
        difference = delta.double() - first
        total = total.add_(difference)
        squares = squares.addcmul_(difference, difference)
    return squares.addcmul_(total, total, value=-1 / len(deltas))


def spread_of(block: Block) -> Tensor:
    """Return the spread [*] of a block over the experts that have a say."""
    return spread(with_a_say(block.deltas, block.weights))


def thresholds(blocks: Blocks, *, weights: Tensor, density: float) -> Tensor:
    """Return the spread [] from which on entries are kept; 0 where no entry has one."""
    zero = torch.zeros((), dtype=torch.int64, device=weights.device)
    varying = int(summed(blocks, lambda block: spread_of(block).count_nonzero(), zero))
    if varying == 0:
        return torch.zeros((), dtype=torch.float64)
    rank = share_of(density, varying)
    return kth(blocks, lambda block: spread_of(block).unsqueeze(0), lambda n: rank)[0]


def selected(deltas: Tensor, weights: Tensor, threshold: Tensor | None) -> Tensor:
    """Return the deltas [K *], entries of a spread below the threshold [] set to 0."""
    if threshold is None:
        return deltas
    return torch.where(
        spread(with_a_say(deltas, weights)) >= threshold.to(deltas.device), deltas, 0
    )


def energies(blocks: Blocks, *, weights: Tensor, threshold: Tensor | None) -> Tensor:
    """Return |tau_i|^2 over the entries kept, relative to the largest [K]; 1 each where all are 0."""

    def squares(block: Block) -> Tensor:
        return torch.stack(
            [
                delta.double().square().sum()
                for delta in selected(block.deltas, block.weights, threshold)
            ]
        )

    found = summed(
        blocks, squares, torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    )
    return found / found.amax() if found.amax() > 0 else torch.ones_like(found)


def _threshold_scope(options: Mapping[str, Any]) -> Scope | None:
    return "tensor" if options["density"] < 1 else None


def _energy_scope(options: Mapping[str, Any]) -> Scope | None:
    return "tensor" if options["coefficients"] == "energy" else None


@method(
    "sce",
    paper="arXiv 2408.07990",
    statistics=(
        Statistic("threshold", thresholds, _threshold_scope),
        Statistic("energy", energies, _energy_scope),
    ),
    neutral_options={"density": 1.0, "coefficients": "none"},
)
def sce(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    threshold: Tensor | None,
    energy: Tensor | None,
    density: Annotated[float, Between(0, 1, open_low=True)] = 0.1,
    coefficients: Literal["energy", "none"] = "energy",
    scale: float = 1.0,
) -> Tensor:
    """Return the base plus `scale` (lambda) times the energy-weighted mean of the selected entries of one sign [*].

    Weights are relative: only `scale` changes the length. `density` 1 selects all; `coefficients` none leaves out step 2.
    """
    kept = selected(deltas, weights, threshold)
    e = torch.ones_like(weights) if energy is None else energy
    gamma = torch.where(weighted_sum(kept, weights) >= 0, 1.0, -1.0).double()
    total, mass = torch.zeros_like(gamma), torch.zeros_like(gamma)
    for delta, weight, coefficient in zip(kept, weights.double(), e, strict=True):
        agreeing = (delta * weight * gamma).clamp_min(0)
        total = total + agreeing * coefficient
        mass = mass + agreeing.sign() * (coefficient * weight.abs())
    tau = gamma * total / torch.where(mass > 0, mass, 1.0)
    return base + scale * tau.to(base.dtype)
