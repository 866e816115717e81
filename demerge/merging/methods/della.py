"""DELLA: drop small entries more often than large ones, rescale, elect, fuse (arXiv 2406.11617).

    p_j    = density - epsilon + 2 epsilon rank_j / (n - 1)     rank_j = 0 .. n - 1 in its row, by rising magnitude
    tau_j' = m_j tau_j / p_j,  m_j ~ Bernoulli(p_j)             (rescale = own; `l1` keeps the tensor's 1-norm instead)
    theta  = theta_0 + lambda disjoint_merge(tau')              (then = ties; or linear)

A row is what belongs to one output: the first axis is that of the rows; vectors are one row. In a row of one entry p is
the density. Of equal magnitudes the first in the row has the lower rank. `ranks=axis` ranks along the second axis
alone, at each place of a kernel by itself, as mergekit does; for matrices and vectors that is the row. Differs from the
paper's drop rates, whose mean is epsilon / 2n off the density, by spreading them evenly around it, as mergekit does.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from demerge.errors import UsageError
from demerge.merging.method_options import Between
from demerge.merging.methods.dare import kept
from demerge.merging.methods.stages import Then, aggregate
from demerge.merging.methods.statistics import l1_norms
from demerge.merging.methods.ties import Mean, balance, elect
from demerge.merging.registry import method

PIECE = 1 << 20  # entries ranked at once


def probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return the probability p [R n] of each entry of a delta [R n] to be kept."""
    n = delta.shape[1]
    if n == 1:
        return torch.full_like(delta, density)
    p = torch.empty_like(delta)
    step = torch.linspace(
        density - epsilon, density + epsilon, n, dtype=delta.dtype, device=delta.device
    )
    for part, result in zip(*(t.split(max(1, PIECE // n)) for t in (delta, p)), strict=True):
        result.scatter_(1, part.abs().argsort(dim=1, stable=True), step.expand(len(part), n))
    return p


def pruned(
    delta: Tensor, uniform: Tensor, density: float, epsilon: float, ranks: str, rescale: str
) -> Tensor:
    """Return tau' [*] of one expert."""
    lines = delta.movedim(1, -1) if ranks == "axis" and delta.ndim > 2 else delta
    rows = (
        lines.shape[:-1].numel()
        if ranks == "axis"
        else delta.shape[0]
        if ranks == "row" and delta.ndim > 1
        else 1
    )
    p = probabilities(lines.reshape(rows, -1), density, epsilon).view(lines.shape)
    p = p.movedim(-1, 1) if lines is not delta else p
    remaining = delta * kept(uniform, p)
    if rescale == "own":
        return remaining / p
    before, after = l1_norms([delta, remaining]).tolist()
    return remaining * (before / after) if rescale == "l1" and after > 0 else remaining


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
    density: Annotated[float, Between(0, 1, open_low=True)] = 0.5,
    epsilon: Annotated[float, Between(0, 0.5)] = 0.15,
    ranks: Literal["row", "tensor", "axis"] = "row",
    rescale: Literal["own", "l1", "none"] = "own",
    then: Then = "ties",
    undecided: Literal["majority", "plus"] = "majority",
    mean: Mean = "weights",
    scale: float = 1.0,
) -> Tensor:
    """Return the base plus `scale` (lambda) times the merge of task vectors thinned by magnitude and chance [*].

    `undecided` and `mean` are those of ties and matter where `then` is ties; `ranks` are counted by row, over
    the tensor, or along its second axis.

    Raises:
        UsageError: unless 0 < density - epsilon and density + epsilon <= 1.
    """
    if not epsilon < density <= 1 - epsilon:
        raise UsageError(
            f"options density={density:g} and epsilon={epsilon:g} give probabilities outside (0, 1]",
            fix="choose epsilon < density and density + epsilon <= 1, for example density=0.5 epsilon=0.15",
        )
    thinned = [
        pruned(d, u, density, epsilon, ranks, rescale) for d, u in zip(deltas, uniform, strict=True)
    ]
    wanted = then == "ties" and undecided == "majority"
    majority = balance(elect(thinned, weights, "mass")).sign() if wanted else None
    return aggregate(base, thinned, weights, then, majority, mean, scale)
