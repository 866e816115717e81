"""MagMax: of all task vectors, the entry of largest magnitude (arXiv 2407.06322).

    tau = r_m tau_m,  m = argmax_i abs(r_i tau_i),  r_i = w_i / max_j abs(w_j)
    theta = theta_0 + lambda tau

Of a positive and a negative entry of one magnitude the positive is taken. Differs from the authors'
code there: it takes the later expert, so that the result depends on their order. Differs from the
paper by the weights, which it does not have: equal weights, of any size, give its formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from demerge.merging.methods.shared.geometry import relative
from demerge.merging.registry import method


@method("magmax", paper="arXiv 2407.06322", force_float64=True)
def magmax(base: Tensor, deltas: Tensor, *, weights: Tensor, scale: float = 1.0) -> Tensor:
    """Take, for each entry, the task vector that changes it most [*].

    Weights are relative: an entry counts and enters with w_i / max abs(w).
    """
    r = relative(weights)
    highest = lowest = deltas[0] * r[0]
    for delta, weight in zip(deltas[1:], r[1:], strict=True):
        weighed = delta * weight
        highest, lowest = torch.maximum(highest, weighed), torch.minimum(lowest, weighed)
    return base + scale * torch.where(highest >= -lowest, highest, lowest)
