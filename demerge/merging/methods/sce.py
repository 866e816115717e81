"""SCE: select, calculate, erase (FuseChat 3.0, arXiv 2408.07990).

    1 select     in each tensor keep the entries where the experts differ most: the variance of
                 tau_1 .. tau_K is >= its k-th largest, k = max(1, floor(density m)), m entries
                 having one other than 0
    2 calculate  e_i = |tau_i|^2 over what is kept of the tensor
    3 erase      gamma = sgn(sum_i w_i tau_i), positive if 0; A = {i: sgn(w_i tau_i) = gamma}
                 tau = sum_{i in A} e_i w_i tau_i / sum_{i in A} e_i abs(w_i)
                 theta = theta_0 + lambda tau

Entries of equal variance at the threshold are all kept. If no entry of a tensor differs between the
experts, as with one expert, there is nothing to select by and all are kept. Differs from the paper
by the weights, which it does not have; an expert of weight 0 has no say. Squares are taken in
float64: those of small deltas are 0 in half precision.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from demerge.merging.method_options import Share
from demerge.merging.methods.linear import weighted_sum
from demerge.merging.methods.shared.geometry import summed, with_a_say
from demerge.merging.methods.shared.selection import kth, share_of
from demerge.merging.registry import Block, Blocks, Statistic, method


def spread(deltas: Tensor, weights: Tensor) -> Tensor:
    """Return K times the variance over the experts that have a say [*], in float64.

    It is exactly 0 if they are equal: taken of the differences to the first expert, whose squares
    are at most K times the result, nothing cancels.
    """
    deltas = with_a_say(deltas, weights)
    first = deltas[0].double()
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for delta in deltas[1:]:
        difference = delta.double() - first
        total = total.add_(difference)
        squares = squares.addcmul_(difference, difference)
    return squares.addcmul_(total, total, value=-1 / len(deltas))


def thresholds(blocks: Blocks, *, weights: Tensor, density: float) -> Tensor:
    """Return the spread [] from which on entries are kept; 0 if no entry has one."""

    def spread_of(block: Block) -> Tensor:
        return spread(block.deltas, block.weights)

    zero = torch.zeros((), dtype=torch.int64, device=weights.device)
    varying = int(summed(blocks, lambda block: spread_of(block).count_nonzero(), zero))
    if varying == 0:
        return torch.zeros((), dtype=torch.float64)
    rank = share_of(density, varying)
    return kth(blocks, lambda block: spread_of(block).unsqueeze(0), lambda n: rank)[0]


def select(deltas: Tensor, weights: Tensor, threshold: Tensor | None) -> Tensor:
    """Return the deltas [K *], entries of a spread below the threshold [] set to 0."""
    if threshold is None:
        return deltas
    return torch.where(spread(deltas, weights) >= threshold.to(deltas.device), deltas, 0)


def energies(blocks: Blocks, *, weights: Tensor, threshold: Tensor | None) -> Tensor:
    """Return |tau_i|^2 over the entries kept, relative to the largest [K]; 1 each if all are 0."""

    def squares(block: Block) -> Tensor:
        kept = select(block.deltas, block.weights, threshold)
        return torch.stack([delta.double().square().sum() for delta in kept])

    zero = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    total = summed(blocks, squares, zero)
    return total / total.amax() if total.amax() > 0 else torch.ones_like(total)


@method(
    "sce",
    paper="arXiv 2408.07990",
    statistics=(
        Statistic("threshold", thresholds, lambda o: "tensor" if o["density"] < 1 else None),
        Statistic(
            "energy", energies, lambda o: "tensor" if o["coefficients"] == "energy" else None
        ),
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
    density: Share = 0.1,
    coefficients: Literal["energy", "none"] = "energy",
    scale: float = 1.0,
) -> Tensor:
    """Keep the entries in which the experts differ most, and average those of one sign [*].

    Weights are relative: only `scale` changes the length.

    Args:
        coefficients: whether experts count by the energy of what is kept of them
    """
    kept = select(deltas, weights, threshold)
    e = torch.ones_like(weights) if energy is None else energy
    gamma = torch.where(weighted_sum(kept, weights) >= 0, 1.0, -1.0).double()
    total, mass = torch.zeros_like(gamma), torch.zeros_like(gamma)
    for delta, weight, coefficient in zip(kept, weights.double(), e, strict=True):
        agreeing = (delta * weight * gamma).clamp_min(0)
        total = total + agreeing * coefficient
        mass = mass + agreeing.sign() * (coefficient * weight.abs())
    tau = gamma * total / torch.where(mass > 0, mass, 1.0)
    return base + scale * tau.to(base.dtype)
