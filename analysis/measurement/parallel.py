"""Several processes, one measurement: each takes every n-th group, and all of them end with the rows of all.

Started by `accelerate launch` or `torchrun`, which say how many there are; alone otherwise. A row is made by one process and
sent to the others as it is, so that a map of a given number of groups does not depend on how many measured it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import broadcast


@dataclass(frozen=True, slots=True)
class World:
    """This process among `size` of them; the first is the one that prints and writes."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def share(self, values: Tensor, owner: int = 0) -> Tensor:
        """Overwrite `values` by those that the process `owner` has; return them."""
        if self.size > 1:
            broadcast(values, src=owner)
        return values

    def agree(self, value: float, device: torch.device | str = "cpu") -> float:
        """Return the first process's value."""
        if self.size == 1:
            return value
        kind = torch.float32 if torch.device(device).type == "mps" else torch.float64
        return float(self.share(torch.tensor([value], dtype=kind, device=device)))


ALONE = World()


def join(device: str) -> tuple[World, str]:
    """Join the processes that a launcher started; return this one's place and its device, the own one of several GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE, device
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    place = str(state.device) if device.startswith("cuda") else device
    return World(state.process_index, state.num_processes), place
