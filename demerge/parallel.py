"""Several processes, one piece of work: who is the first, how many there are, what they agree on.

`accelerate launch` or `torchrun` starts them and says how many there are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed
from torch import Tensor

from demerge.errors import UsageError


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

    def any_of(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set in any process; no device is waited for."""
        if self.size == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(values, group=_host_group())
        return [value > 0 for value in values.tolist()]

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            torch.distributed.barrier()


@cache
def _host_group() -> torch.distributed.ProcessGroup | None:
    """Return the group of all processes that talks about tensors of the host."""
    return torch.distributed.new_group(backend="gloo")


ALONE = World()


def launched_processes() -> int:
    """Return the number of processes that the launcher of this one started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str, expected: int | None = None) -> tuple[World, str]:
    """Join the processes that a launcher started; return this one's place and its own device.

    Args:
        expected: the number of processes that there must be; None for any.

    Raises:
        UsageError: if there is another number of them, or accelerate is set to split the model.
    """
    size = launched_processes()
    if expected is not None and size != expected:
        what = f"{expected} processes were expected, and this is one of {size}"
        fix = f"start them with: torchrun --nproc-per-node {expected} -m demerge.cli.main ..."
        raise UsageError(what, fix=fix)
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1"):
            what = f"accelerate is set to use {engine}, which splits a model among processes"
            fix = "use accelerate launch --multi_gpu: every process holds the whole model"
            raise UsageError(what, fix=fix)
    if size < 2:
        return ALONE, device
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    own = str(state.device) if device.startswith("cuda") else device
    return World(state.process_index, state.num_processes), own
