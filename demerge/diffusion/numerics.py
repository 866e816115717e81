"""What torch needs to be told: where to add up, and how not to crash."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def accumulator(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return zeros in float64 on a device, or on the CPU where it has no float64."""
    return torch.zeros(
        tuple(shape), dtype=torch.float64, device="cpu" if device.type == "mps" else device
    )


def contiguous_groupnorm_inputs(denoiser: nn.Module) -> None:
    """Give each group norm that trains a contiguous input where nothing before it trains, in place.

    torch 2.13 crashes on the CPU in the backward of a group norm whose input is channels-last and asks for no gradient.
    """
    for module in denoiser.modules():
        if isinstance(module, nn.GroupNorm) and any(p.requires_grad for p in module.parameters()):
            module.register_forward_pre_hook(_contiguous)


def _contiguous(norm: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x if x.requires_grad else x.contiguous() for x in arguments)
