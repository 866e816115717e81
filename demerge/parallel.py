"""Several processes, one piece of work: who is the first, how many there are, what they agree on.

`accelerate launch` or `torchrun` starts them and says how many there are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True, slots=True)
class World:
    """This process among `size` of them; the first is the one that prints and writes."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def broadcast(self, values: Tensor, owner: int = 0) -> Tensor:
        """Overwrite `values` by those of the process `owner`; return them."""
        if self.size > 1:
            torch.distributed.broadcast(values, src=owner)
        return values

    def broadcast_number(self, value: float, device: torch.device | str = "cpu") -> float:
        """Return the first process's value."""
        if self.size == 1:
            return value
        kind = torch.float32 if torch.device(device).type == "mps" else torch.float64
        return float(self.broadcast(torch.tensor([value], dtype=kind, device=device)))


ALONE = World()


def join(device: str) -> tuple[World, str]:
    """Join the processes that a launcher started; return this one's place and its own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE, device
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    own = str(state.device) if device.startswith("cuda") else device
    return World(state.process_index, state.num_processes), own
