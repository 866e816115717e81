"""Range-weighted merging (ours): an expert counts by its range of timesteps, and by what is known
of it there.

    theta = theta_0 + lambda sum_i v_i tau_i / sum_i v_i,  v_i = w_i m_i f_i

    by         m_i, for the range R_i                                        f_i
    mass       |R_i|, the number of its timesteps                            1
    snr        the difference of log SNR over R_i                            1
    min_snr    sum_{t in R_i} min(SNR_t, gamma) / SNR_t (arXiv 2303.09556)   1
    fisher     |R_i|                                  tr F_i, of the tensor or the model
    conflict   |R_i|                                  (1 + mean_{j != i} cos(tau_i, tau_j)) / 2

By Fisher trace it is the mean that minimises sum_i |R_i| tr(F_i) |theta - theta_i|^2, the loss of
all timesteps to second order with the curvature of each tensor averaged. If all f_i are 0, as for
tensors without a gradient, they count as 1. A timestep of SNR 0 has the smallest SNR of the others
for `snr`, and the factor 1 for `min_snr`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from demerge.errors import UsageError
from demerge.merging.method_options import Between
from demerge.merging.methods.fisher import check_not_negative, check_weights_not_negative
from demerge.merging.methods.linear import nonzero_sum, weighted_sum
from demerge.merging.methods.shared.geometry import cosines, gram, summed
from demerge.merging.registry import Block, Blocks, Scope, Statistic, method
from demerge.timesteps import TimestepRange

By = Literal["mass", "snr", "min_snr", "fisher", "conflict"]


def traces(blocks: Blocks, *, weights: Tensor) -> Tensor:
    """Return tr F_i for each expert [K]."""

    def trace(block: Block) -> Tensor:
        fisher = block.inputs.get("fisher")
        if fisher is None:
            fix = "make fisher.safetensors next to each expert with `demerge stats`, or use by=mass"
            raise UsageError("option by=fisher needs the Fisher of each expert", fix=fix)
        check_not_negative(fisher)
        return fisher.reshape(len(weights), -1).sum(1, dtype=torch.float64)

    zero = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    return summed(blocks, trace, zero)


def shares(
    blocks: Blocks,
    *,
    weights: Tensor,
    ranges: Sequence[TimestepRange | None],
    snr: Tensor | None,
    by: By,
    gamma: float,
    gram: Tensor | None,
    trace: Tensor | None,
) -> Tensor:
    """Return m_i f_i [K]."""
    known = check_ranges(ranges, len(weights))
    mass = [float(len(r)) for r in known]
    if by in ("snr", "min_snr"):
        mass = snr_masses(known, snr, by, gamma)
    m = torch.tensor(mass, dtype=torch.float64, device=weights.device)
    factor = trace if gram is None else agreement(gram, weights)
    if factor is None:
        return m
    check_weights_not_negative(weights, f"range_weighted with by={by}")
    return m * (factor if (factor * weights).any() else torch.ones_like(m))


def check_ranges(ranges: Sequence[TimestepRange | None], K: int) -> list[TimestepRange]:
    """Return the ranges of all K experts."""
    known = [r for r in ranges if r is not None]
    if len(known) != K or len(ranges) != K:
        unknown = ", ".join(str(i) for i, r in enumerate(ranges) if r is None) or "all"
        raise UsageError(
            "method range_weighted needs the timesteps of each expert; "
            f"unknown for expert {unknown} (counted from 0)",
            fix="give --range START:STOP for each expert, in their order",
        )
    return known


def snr_masses(
    ranges: Sequence[TimestepRange], snr: Tensor | None, by: By, gamma: float
) -> list[float]:
    """Return m_i for `snr` and `min_snr`."""
    if snr is None:
        fix = "use by=mass, or merge into a pipeline folder with scheduler/scheduler_config.json"
        raise UsageError(f"option by={by} needs the noise schedule of the base", fix=fix)
    longest = max(ranges, key=lambda r: r.stop)
    if longest.stop > len(snr):
        what = f"range {longest} exceeds the base's {len(snr)} timesteps"
        raise UsageError(what, fix="give ranges of this base")
    if by == "min_snr":
        loss = torch.where(snr > 0, snr.clamp(max=gamma) / torch.where(snr > 0, snr, 1.0), 1.0)
        return [float(loss[r.start : r.stop].sum()) for r in ranges]
    least = float(snr[snr > 0].min()) if bool((snr > 0).any()) else 1.0
    log = snr.clamp_min(least).log()
    middles = (log[1:] + log[:-1]) / 2  # a timestep reaches halfway to its neighbours
    edges = torch.cat([log[:1], middles, log[-1:]])
    return [abs(float(edges[r.stop] - edges[r.start])) for r in ranges]


def agreement(gram: Tensor, weights: Tensor) -> Tensor:
    """Return (1 + mean_{j != i} c_ij) / 2 [K] over the experts j of a weight [K] other than 0.

    For one expert it is 1.
    """
    c, say = cosines(gram), (weights != 0).to(gram)
    others = c @ say - c.diagonal()
    return (1 + others / (say.sum() - 1)) / 2 if say.sum() > 1 else torch.ones_like(others)


def _scope_if(by: By) -> Callable[[Mapping[str, Any]], Scope | None]:
    return lambda options: options["scope"] if options["by"] == by else None


@method(
    "range_weighted",
    paper="demerge",
    statistics=(
        Statistic("gram", gram, _scope_if("conflict"), uses_weights=False),
        Statistic("trace", traces, _scope_if("fisher"), inputs=("fisher",), uses_weights=False),
        Statistic("share", shares),
    ),
)
def range_weighted(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    share: Tensor,
    by: By = "mass",
    scope: Literal["tensor", "model"] = "tensor",
    gamma: Annotated[float, Between(0, 1e6, open_low=True)] = 5.0,
    scale: float = 1.0,
) -> Tensor:
    """Average the experts, each weighted by its range of timesteps [*].

    Args:
        by: what an expert's range counts for
        scope: whether Fisher trace and conflict are taken over each tensor or the model
        gamma: the gamma of min_snr
    """
    v = weights.double() * share
    return base + weighted_sum(deltas, (scale * v / nonzero_sum(v)).to(base.dtype))
