"""The routed ensemble: each x_t goes to the expert whose range holds t.

It is what merging is measured against (DeMe, arXiv 2410.06664, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from demerge.diffusion.conditioning import Condition
from demerge.errors import UsageError
from demerge.timesteps import Partition

Call = Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]


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
        """Return `predict` of stock denoisers that are called by (x, t, **condition)."""
        return UNet2DOutput(sample=self.predict(_call, x, t, condition))

    def predict(self, call: Call, x: Tensor, t: Tensor | float, condition: Condition) -> Tensor:
        """Return the prediction [B *] for x [B *] at t, a number or [B].

        No device is waited for if t is a number or a scalar on the CPU. Else the host waits once,
        for the number of rows of each expert.

        Args:
            call: calls one expert with x, t and condition of its rows.
        """
        t = torch.as_tensor(t)
        timesteps = t.reshape(-1).expand(len(x)).to(x.device)
        if t.numel() == 1 and t.device.type == "cpu":
            return call(self.expert_at(t.item()), x, timesteps, condition)
        edges = torch.tensor([0, *self.partition.cuts, self.partition.total])
        routes = torch.bucketize(timesteps, edges.to(x.device, timesteps.dtype), right=True)
        routes -= (timesteps == self.partition.total).to(routes)
        below, *counts, above = torch.bincount(routes, minlength=len(edges) + 1).tolist()
        if below or above:
            for value in timesteps.tolist():
                self.partition.route(value)  # raises for a timestep outside
        rows = routes.argsort(stable=True).split(counts)
        parts = [
            call(expert, x[own], timesteps[own], {n: value[own] for n, value in condition.items()})
            for expert, own in zip(self.experts, rows, strict=True)
            if len(own)
        ]
        sample = torch.cat(parts)
        return torch.empty_like(sample).index_copy_(0, torch.cat(rows), sample)


def _call(denoiser: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    prediction: Tensor = denoiser(x, t, **condition).sample
    return prediction
