"""Sums in float64 on any device, a workaround for a crash of torch, and the number of threads.

A model whose batch is little work gets one thread. torch shares each operation among its threads,
and they wait for each other by spinning. For a small model the waiting costs more than the sharing
saves: on the digits model (8 MFLOP an image), with one of two cores busy, 60 training steps took
145 s with two threads, 53 s with one. The choice depends on the counted operations alone, never on
a clock, so that a resumed run computes the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from demerge.diffusion.model import Diffusion

LITTLE = 4e9  # floating point operations of a forward pass: about 0.1 s of one core
_FLOPS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

# what `mixed_precision` stands for
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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


@contextmanager
def fitting_threads(model: Diffusion, batch: int) -> Iterator[None]:
    """Use one thread inside the block if forward passes of `batch` samples are little work.

    Nothing changes on an accelerator, or if the user sets OMP_NUM_THREADS.
    """
    before = torch.get_num_threads()
    free = before > 1 and model.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ
    if free and batch * flops(model) < LITTLE:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def flops(model: Diffusion) -> int:
    """Return the floating point operations of one forward pass of one sample, counted once."""
    if model.denoiser not in _FLOPS:
        _FLOPS[model.denoiser] = _count_flops(model)
    return _FLOPS[model.denoiser]


@torch.no_grad()
def _count_flops(model: Diffusion) -> int:
    condition = model.condition(1, [""], [0])
    dtype = next(model.denoiser.parameters()).dtype
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with FlopCounterMode(display=False) as counter, autocast:
        model.predict(torch.zeros(1, *model.sample_shape), 0, condition)
    return int(counter.get_total_flops())
