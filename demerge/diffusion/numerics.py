"""Sums in float64 on any device, and a workaround for a crash of torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def accumulator(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return zeros in float64 on a device, or on the CPU if the device has no float64."""
    place = "cpu" if device.type == "mps" else device
    return torch.zeros(tuple(shape), dtype=torch.float64, device=place)


def contiguous_groupnorm_inputs(denoiser: nn.Module) -> None:
    """Give each group norm that trains a contiguous input if nothing before it trains, in place.

    torch 2.13 crashes on the CPU in the backward of a group norm whose input is channels-last and
    requires no gradient.
    """
    for module in denoiser.modules():
        if isinstance(module, nn.GroupNorm) and any(p.requires_grad for p in module.parameters()):
            module.register_forward_pre_hook(_contiguous)


def _contiguous(norm: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x if x.requires_grad else x.contiguous() for x in arguments)
