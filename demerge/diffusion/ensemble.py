"""Experts in their folder, as one model that draws and scores like any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from demerge.diffusion.adapters import load_model
from demerge.diffusion.model import Diffusion
from demerge.diffusion.routing import RoutedDenoiser
from demerge.expert import list_experts
from demerge.timesteps import Partition


def routed(base: Diffusion, partition: Partition, denoisers: Sequence[nn.Module]) -> Diffusion:
    """Return the routed ensemble as a model that samples and scores like any other."""
    return base.with_denoiser(RoutedDenoiser(partition, denoisers))


def load_routed(
    base: str | Path | Diffusion, experts: str | Path, *, device: str = "cpu"
) -> Diffusion:
    """Load the experts in the subfolders of `experts`, routed on the base's schedule.

    Raises:
        InputError: if there is no expert, or their ranges do not cover [0, T).
    """
    folders = list_experts(experts)
    base = base if isinstance(base, Diffusion) else Diffusion.load(base, device=device)
    denoisers = [load_model(path, base, device=device).denoiser for path in folders.values()]
    return routed(base, Partition(tuple(folders)), denoisers)
