"""Range-weighted merging (ours): an expert counts by its range of timesteps, and by what is known of it there.

    theta = theta_0 + lambda sum_i v_i tau_i / sum_i v_i,  v_i = w_i m_i f_i

    by         m_i, for the range R_i                                        f_i
    mass       |R_i|, the number of its timesteps                            1
    snr        the difference of log SNR over R_i                            1
    min_snr    sum_{t in R_i} min(SNR_t, gamma) / SNR_t (arXiv 2303.09556)   1
    fisher     |R_i|                                                         tr F_i, of the tensor or the model
    conflict   |R_i|                                                         (1 + mean_{j != i} cos(tau_i, tau_j)) / 2

By Fisher trace it is the mean that minimises sum_i |R_i| tr(F_i) |theta - theta_i|^2, the loss of all timesteps to second
order with the curvature of each tensor averaged. Where all f_i are 0, as for tensors without a gradient, they count as 1.
A timestep of SNR 0 has the smallest SNR of the others for `snr`, and the factor 1 for `min_snr`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from demerge.errors import UsageError
from demerge.merging.method_options import Between
from demerge.merging.methods.fisher import check_not_negative, check_weights_not_negative
from demerge.merging.methods.linear import nonzero_sum, weighted_sum
from demerge.merging.methods.statistics import cosines, gram, summed
from demerge.merging.registry import Block, Blocks, Scope, Statistic, method
from demerge.timesteps import TimestepRange

By = Literal["mass", "snr", "min_snr", "fisher", "conflict"]


def traces(blocks: Blocks, *, weights: Tensor) -> Tensor:
    """Return tr F_i for each expert [K].

    Raises:
        UsageError: where the experts have no Fisher.
        InputError: where it has negative entries.
    """
    zero = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    return summed(
        blocks,
        lambda block: _fisher(block).reshape(len(weights), -1).sum(1, dtype=torch.float64),
        zero,
    )


def _fisher(block: Block) -> Tensor:
    fisher = block.inputs.get("fisher")
    if fisher is None:
        raise UsageError(
            "option by=fisher needs the Fisher of each expert, none given",
            fix="make fisher.safetensors beside each expert with `demerge stats`, or choose by=mass",
        )
    check_not_negative(fisher)
    return fisher


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
    """Return m_i f_i [K].

    Raises:
        UsageError: where the range of an expert is not known, or the schedule of the base where it is asked for; or a
            weight is negative where f_i differs from tensor to tensor, so that the sum of the v_i might vanish.
    """
    known = known_ranges(ranges, len(weights))
    if by in ("snr", "min_snr"):
        return torch.tensor(
            masses(known, snr, by, gamma), dtype=torch.float64, device=weights.device
        )
    mass = torch.tensor([len(r) for r in known], dtype=torch.float64, device=weights.device)
    factor = trace if gram is None else agreement(gram, weights)
    if factor is None:
        return mass
    check_weights_not_negative(weights, f"range_weighted with by={by}")
    return mass * (factor if (factor * weights).any() else torch.ones_like(mass))


def known_ranges(ranges: Sequence[TimestepRange | None], K: int) -> list[TimestepRange]:
    """Return the ranges of all K experts.

    Raises:
        UsageError: where one is not known.
    """
    known = [r for r in ranges if r is not None]
    if len(known) != K or len(ranges) != K:
        lacking = ", ".join(str(i) for i, r in enumerate(ranges) if r is None) or "all"
        raise UsageError(
            f"method range_weighted needs the timesteps of each expert; unknown for expert {lacking} (counted from 0)",
            fix="give --range START:STOP for each expert, in their order",
        )
    return known


def masses(
    ranges: Sequence[TimestepRange], snr: Tensor | None, by: By, gamma: float
) -> list[float]:
    """Return m_i for `snr` and `min_snr`.

    Raises:
        UsageError: where the schedule is not known, or has fewer timesteps than the ranges.
    """
    if snr is None:
        raise UsageError(
            f"option by={by} needs the noise schedule of the base, which names none",
            fix="choose by=mass, or merge into a pipeline folder with scheduler/scheduler_config.json",
        )
    if max(r.stop for r in ranges) > len(snr):
        longest = max(ranges, key=lambda r: r.stop)
        raise UsageError(
            f"range {longest} exceeds the base's {len(snr)} timesteps",
            fix="give ranges of this base",
        )
    if by == "min_snr":
        loss = torch.where(snr > 0, snr.clamp(max=gamma) / torch.where(snr > 0, snr, 1.0), 1.0)
        return [float(loss[r.start : r.stop].sum()) for r in ranges]
    log = snr.clamp_min(float(snr[snr > 0].min()) if bool((snr > 0).any()) else 1.0).log()
    edges = torch.cat(
        [log[:1], (log[1:] + log[:-1]) / 2, log[-1:]]
    )  # a timestep reaches halfway to its neighbours
    return [abs(float(edges[r.stop] - edges[r.start])) for r in ranges]


def agreement(gram: Tensor, weights: Tensor) -> Tensor:
    """Return (1 + mean_{j != i} c_ij) / 2 [K], j among the experts of a weight [K] other than 0; 1 for one expert."""
    c, say = cosines(gram), (weights != 0).to(gram)
    others = c @ say - c.diagonal()
    return (1 + others / (say.sum() - 1)) / 2 if say.sum() > 1 else torch.ones_like(others)


def _scope_of(by: str) -> Any:
    def scope(options: Mapping[str, Any]) -> Scope | None:
        found: Scope = options["scope"]
        return found if options["by"] == by else None

    return scope


def _tensor_scope(options: Mapping[str, Any]) -> Scope:
    return "tensor"


@method(
    "range_weighted",
    paper="demerge",
    statistics=(
        Statistic("gram", gram, _scope_of("conflict"), uses_weights=False),
        Statistic("trace", traces, _scope_of("fisher"), inputs=("fisher",), uses_weights=False),
        Statistic("share", shares, _tensor_scope),
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
    """Return the base plus `scale` (lambda) times the mean of the task vectors, weighted by their ranges [*].

    `scope` is where Fisher trace and conflict are taken; `gamma` is that of min_snr.

    Raises:
        UsageError: where the weighted shares sum to 0.
    """
    v = weights.double() * share
    return base + weighted_sum(deltas, (scale * v / nonzero_sum(v)).to(base.dtype))
