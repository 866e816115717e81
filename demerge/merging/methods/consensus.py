"""Consensus merging: only the entries that several experts need (TALL masks, arXiv 2405.07813).

    tau_MTL = sum_i r_i tau_i                              (of = linear, r_i = w_i / max_j abs(w_j))
    tau_MTL = the merged task vector of TIES               (of = ties, with `density`)
    m_i     = [abs(tau_i) > lambda_t abs(tau_MTL - tau_i) / n]       expert i needs the entry
    theta   = theta_0 + lambda [sum_i m_i >= k] tau

with n = K - 1 (others = mean) or 1 (others = sum), K being the number of experts of a weight other
than 0, and n = 1 if tau_MTL is of TIES, which is a mean already; tau = sum_i w_i tau_i (linear) or
tau_MTL (ties). k = 0 is the plain merge, 1 leaves out what no expert needs (catastrophic weights),
2 also what only one needs (selfish weights). If there are fewer experts than k, all must need it.

Differs from the paper by n: an entry is compared with the mean of the other experts, the paper's
with their sum. The sum grows with K: of K equal experts none needs an entry as soon as lambda_t >=
1/(K - 1), and the base comes back (four experts and 0.4). Against the mean, experts that agree need
it for each lambda_t < 1, whatever K; two experts are the paper's case either way, and
`preset=paper` is its formula. Differs also by the weights, which the paper does not have (an expert
of weight 0 has no say), and by one `threshold` (lambda_t) for all experts, which it tunes for each.
Differs from the authors' code if tau_MTL is of TIES: theirs is a sum of the elected entries, ours
their mean, as in `ties`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from demerge.merging.method_options import Between, Share
from demerge.merging.methods.linear import weighted_sum
from demerge.merging.methods.shared.geometry import relative
from demerge.merging.methods.shared.selection import kth_magnitudes
from demerge.merging.methods.ties import disjoint_merge, elect, majority_sign, trim
from demerge.merging.registry import Blocks, Scope, Statistic, method


def trimmed_majority(blocks: Blocks, *, trimming: Tensor) -> Tensor:
    """Return the sign [] of the sum of all signs elected after trimming."""
    return majority_sign(
        blocks, lambda b: elect(trim(b.deltas, trimming, None, b.start), b.weights, "mass")
    )


def count_needs(deltas: Tensor, merged: Tensor, weights: Tensor, threshold: float) -> Tensor:
    """Return how many experts of a weight other than 0 need each entry [*]."""
    count = torch.zeros_like(merged)
    for delta, weight in zip(deltas, weights, strict=True):
        needs = delta.abs() > threshold * (merged - delta).abs()
        count += needs & (weight != 0)
    return count


def _scope_of_ties(options: Mapping[str, Any]) -> Scope | None:
    return options["scope"] if options["of"] == "ties" else None


@method(
    "consensus",
    paper="arXiv 2405.07813",
    statistics=(
        Statistic("trimming", kth_magnitudes, _scope_of_ties, uses_weights=False),
        Statistic("majority", trimmed_majority, _scope_of_ties),
    ),
    presets={"paper": {"others": "sum"}},
    neutral_options={"k": 0},
    force_float64=True,
)
def consensus(
    base: Tensor,
    deltas: Tensor,
    *,
    weights: Tensor,
    trimming: Tensor | None,
    majority: Tensor | None,
    threshold: Annotated[float, Between(0, 1e6)] = 0.4,
    k: Annotated[int, Between(0, 1e6)] = 2,
    others: Literal["mean", "sum"] = "mean",
    of: Literal["linear", "ties"] = "linear",
    density: Share = 0.2,
    scope: Literal["model", "tensor"] = "model",
    scale: float = 1.0,
) -> Tensor:
    """Keep the entries of the merged task vector that at least `k` experts need [*].

    Args:
        threshold: lambda_t; the larger, the fewer entries an expert needs
        k: least number of experts that must need an entry
        others: what an entry is compared with: the mean or the sum of the other experts
        of: the merge whose entries are kept: the weighted sum, or ties
        density: share of the entries that are kept, if `of` is ties
    """
    r, K = relative(weights), int(weights.count_nonzero())
    if trimming is None or majority is None:
        merged, length = weighted_sum(deltas, r), scale * weights.abs().amax()
    else:
        trimmed = trim(deltas, trimming, None, 0)
        merged = disjoint_merge(trimmed, weights, "mass", majority)
        length = torch.full_like(weights[0], scale)
    n = max(K - 1, 1) if of == "linear" and others == "mean" else 1
    enough = count_needs(deltas, merged, weights, threshold / n) >= min(k, K)
    return base + length * torch.where(enough, merged, 0)
