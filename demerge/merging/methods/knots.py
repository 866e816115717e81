"""KnOTS: an element method in the basis that the task matrices share (arXiv 2410.19735).

    [tau_1 .. tau_K] = U S [V_1^T .. V_K^T]
    theta = theta_0 + lambda U merge(S V_1^T, .., S V_K^T)

`then` is the element method: `linear`, the weighted sum, for which the basis makes no difference;
`ties`, trimmed to `density` per tensor, signs by mass, disjoint mean; `dare`, thinned to `density`,
then the weighted sum.

Differs from the authors' program by trimming per tensor, not over the model, and if votes are even:
the entry is 0, since the sign of a row of S V_i^T is arbitrary and a majority of such signs means
nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from demerge.merging.method_options import Share
from demerge.merging.methods.dare import drop
from demerge.merging.methods.linear import weighted_sum
from demerge.merging.methods.shared.geometry import with_a_say
from demerge.merging.methods.shared.selection import share_of
from demerge.merging.methods.shared.spectral import as_matrix, thin_svd
from demerge.merging.methods.ties import disjoint_merge, trim
from demerge.merging.registry import method


@method(
    "knots", paper="arXiv 2410.19735", needs_full_tensor=True, neutral_options={"then": "linear"}
)
def knots(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    uniform: Tensor,
    then: Literal["linear", "ties", "dare"] = "ties",
    density: Share = 0.2,
    scale: float = 1.0,
) -> Tensor:
    """Merge the task matrices in the basis that they share [*].

    Weights act as in the method that `then` names; an expert of weight 0 has no part in the basis.
    Vectors are matrices of one row.

    Args:
        then: the method that merges in the common basis
    """
    if then == "linear":
        return base + weighted_sum(deltas, scale * weights)
    deltas, uniform, weights = (with_a_say(rows, weights) for rows in (deltas, uniform, weights))
    U, aligned = _align([as_matrix(delta) for delta in deltas])
    if then == "ties":
        trimmed = trim(aligned, _thresholds(aligned, density), None, 0)
        merged = disjoint_merge(trimmed, weights.double(), "mass", 0.0)
    else:
        chance = torch.stack([as_matrix(u)[: U.shape[1]] for u in uniform])
        merged = weighted_sum(drop(aligned, chance, density), weights.double() / density)
    return base + (scale * (U @ merged)).to(base.dtype).view_as(base)


def _align(matrices: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return U [m r] and S V_i^T [K r n]."""
    U, S, Vh = thin_svd(torch.cat(matrices, 1))
    return U, torch.stack((S.unsqueeze(1) * Vh).chunk(len(matrices), dim=1))


def _thresholds(aligned: Tensor, density: float) -> Tensor:
    """Return the k-th largest magnitude [K] of each expert, k = max(1, floor(density n))."""
    n = aligned[0].numel()
    if n == 0:
        return aligned.new_zeros(len(aligned))
    k = share_of(density, n)
    return aligned.abs().flatten(1).kthvalue(n - k + 1, dim=1).values
