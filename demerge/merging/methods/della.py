"""DELLA: drop small entries more often than large ones, rescale, elect, fuse (arXiv 2406.11617).

    p_j    = density - epsilon + 2 epsilon rank_j / (n - 1)
    tau_j' = m_j tau_j / p_j,  m_j ~ Bernoulli(p_j)             (rescale = own)
    theta  = theta_0 + lambda disjoint_merge(tau')              (then = ties; or linear)

with rank_j = 0 .. n - 1 in its row, by rising magnitude; `rescale=l1` keeps the tensor's 1-norm. A
row is what belongs to one output: the first axis is that of the rows; vectors are one row. In a row
of one entry p is the density. Of equal magnitudes the first in the row has the lower rank.
`ranks=axis` ranks along the second axis alone, at each place of a kernel, as mergekit does; for
matrices and vectors that is the row. Differs from the paper's drop rates, whose mean is epsilon /
2n off the density, by spreading them evenly around it, as mergekit does.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from demerge.errors import UsageError
from demerge.merging.method_options import Between, Share
from demerge.merging.methods.dare import keep_mask
from demerge.merging.methods.shared.geometry import l1_norms, norm_ratio
from demerge.merging.methods.shared.stages import Then, aggregate
from demerge.merging.methods.ties import Mean, Undecided, balance, elect
from demerge.merging.registry import method

PIECE = 1 << 20  # entries ranked at once


def probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return the probability p [R n] of each entry of a delta [R n] to be kept."""
    n = delta.shape[1]
    if n == 1:
        return torch.full_like(delta, density)
    p = torch.empty_like(delta)
    ends = density - epsilon, density + epsilon
    step = torch.linspace(*ends, n, dtype=delta.dtype, device=delta.device)
    for part, result in zip(*(t.split(max(1, PIECE // n)) for t in (delta, p)), strict=True):
        result.scatter_(1, part.abs().argsort(dim=1, stable=True), step.expand(len(part), n))
    return p


def prune(
    delta: Tensor, uniform: Tensor, density: float, epsilon: float, ranks: str, rescale: str
) -> Tensor:
    """Return tau' [*] of one expert."""
    is_turned = ranks == "axis" and delta.ndim > 2
    lines = delta.movedim(1, -1) if is_turned else delta
    rows = 1
    if ranks == "axis":
        rows = lines.shape[:-1].numel()
    elif ranks == "row" and delta.ndim > 1:
        rows = delta.shape[0]
    p = probabilities(lines.reshape(rows, -1), density, epsilon).view(lines.shape)
    p = p.movedim(-1, 1) if is_turned else p
    remaining = delta * keep_mask(uniform, p)
    if rescale == "own":
        return remaining / p
    if rescale == "none":
        return remaining
    return remaining * float(norm_ratio(*l1_norms([delta, remaining])))


@method(
    "della",
    paper="arXiv 2406.11617",
    needs_full_tensor=True,
    presets={"mergekit": {"rescale": "l1", "undecided": "plus", "ranks": "axis"}},
    neutral_options={"density": 1.0, "epsilon": 0.0},
)
def della(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    uniform: Tensor,
    density: Share = 0.5,
    epsilon: Annotated[float, Between(0, 0.5)] = 0.15,
    ranks: Literal["row", "tensor", "axis"] = "row",
    rescale: Literal["own", "l1", "none"] = "own",
    then: Then = "ties",
    undecided: Undecided = "majority",
    mean: Mean = "weights",
    scale: float = 1.0,
) -> Tensor:
    """Drop random entries of the task vectors, small ones more often, rescale, and merge [*].

    Args:
        density: mean chance of an entry to be kept
        epsilon: how far the chances of the smallest and the largest entry differ from it
        ranks: within what magnitudes are ranked: a row, the tensor, or its second axis

    Raises:
        UsageError: unless 0 < density - epsilon and density + epsilon <= 1.
    """
    if not epsilon < density <= 1 - epsilon:
        chosen = f"density={density:g} and epsilon={epsilon:g}"
        fix = "choose epsilon < density <= 1 - epsilon, for example density=0.5 epsilon=0.15"
        raise UsageError(f"options {chosen} give probabilities outside (0, 1]", fix=fix)
    pairs = zip(deltas, uniform, strict=True)
    thinned = [prune(d, u, density, epsilon, ranks, rescale) for d, u in pairs]
    majority = None
    if then == "ties" and undecided == "majority":
        majority = balance(elect(thinned, weights, "mass")).sign()
    return aggregate(base, thinned, weights, then, majority, mean, scale)
