"""The routed ensemble: each x_t goes to the expert whose range holds t.

It is what merging is measured against (DeMe, arXiv 2410.06664, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from demerge.diffusion.adapters import load_model
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.expert import list_experts
from demerge.timesteps import Partition


class RoutedDenoiser(nn.Module):
    """A denoiser that sends each sample to the expert of its timestep's range.

    Raises:
        UsageError: if the numbers of experts and ranges differ.
    """

    def __init__(self, partition: Partition, denoisers: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(partition) != len(denoisers):
            what = f"{len(denoisers)} experts for {len(partition)} ranges"
            raise UsageError(what, fix="give one expert for each range")
        self.partition = partition
        self.experts = nn.ModuleList(denoisers)

    @property
    def config(self) -> Any:
        """The config that the experts share."""
        return self.experts[0].config

    def expert_at(self, t: float) -> nn.Module:
        """Return the expert whose range holds t, looked up on the host.

        Raises:
            UsageError: if t lies outside [0, T).
        """
        return self.experts[self.partition.route(t)]

    def forward(self, x: Tensor, t: Tensor | float, **condition: Any) -> UNet2DOutput:
        """Return the prediction [B C H W] for x [B C H W] at t, a number or [B].

        No device is waited for if t is a number or a scalar on the CPU. Else the host waits once,
        for the number of rows of each expert.
        """
        t = torch.as_tensor(t)
        timesteps = t.reshape(-1).expand(len(x)).to(x.device)
        if t.numel() == 1 and t.device.type == "cpu":
            prediction: Tensor = self.expert_at(t.item())(x, timesteps, **condition).sample
            return UNet2DOutput(sample=prediction)
        edges = torch.tensor([0, *self.partition.cuts, self.partition.total])
        routes = torch.bucketize(timesteps, edges.to(x.device, timesteps.dtype), right=True)
        below, *counts, above = torch.bincount(routes, minlength=len(edges) + 1).tolist()
        if below or above:
            for value in timesteps.tolist():
                self.partition.route(value)  # raises for a timestep outside
        rows = routes.argsort(stable=True).split(counts)
        parts = []
        for expert, own in zip(self.experts, rows, strict=True):
            if len(own):
                given = {name: value[own] for name, value in condition.items()}
                parts.append(expert(x[own], timesteps[own], **given).sample)
        sample = torch.cat(parts)
        return UNet2DOutput(sample=torch.empty_like(sample).index_copy_(0, torch.cat(rows), sample))


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
