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
    base: str | Path | Diffusion,
    experts: str | Path,
    *,
    device: str = "cpu",
    resolution: int | None = None,
) -> Diffusion:
    """Load the experts in the folder `experts`, routed on the base's schedule; see `list_experts`.

    A LoRA for timesteps of one of a base's two denoisers is added to that one.

    Args:
        resolution: of the base, if it is a path; see `Diffusion.load`.

    Raises:
        InputError: if there is no expert, or their ranges do not cover [0, T).
    """
    if not isinstance(base, Diffusion):
        base = Diffusion.load(base, device=device, resolution=resolution)
    own = base.denoiser if isinstance(base.denoiser, RoutedDenoiser) else None
    pair = None if own is None else own.partition
    places = list_experts(experts, pair if pair is not None and len(pair) == 2 else None)
    denoisers = []
    for span, path in places.items():
        start = base if own is None else base.with_denoiser(own.expert_at(span.start))
        denoisers.append(load_model(path, start, device=device).denoiser)
    return routed(base, Partition(tuple(places)), denoisers)
