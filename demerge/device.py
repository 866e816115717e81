"""The machine: which device to compute on, its cores, and how much memory is free."""

from __future__ import annotations

import os
from pathlib import Path

from demerge.errors import UsageError


def resolve_device(name: str) -> str:
    """Return the fastest device for `auto`, else the name itself.

    Raises:
        UsageError: if this machine has no such device.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        fix = "give --device cpu or auto"
        raise UsageError(f"device '{name}' cannot be used: {error}", fix=fix) from error
    return name


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes(device: str = "cpu") -> int | None:
    """Return the bytes of a device that are free; None if that is unknown."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return _free_on_this_machine() if device == "cpu" else None


def _free_on_this_machine() -> int | None:
    """Return the bytes that the machine and the control group of this process leave free."""
    try:
        free = _field(Path("/proc/meminfo"), "MemAvailable:") * 1024
    except OSError:
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = (group / "memory.current").read_text()
        reclaimable = _field(group / "memory.stat", "inactive_file")
    except OSError:
        return free
    return min(free, int(limit) - int(used) + reclaimable) if limit.isdigit() else free


def _field(file: Path, name: str) -> int:
    rows = (line.split() for line in file.read_text().splitlines())
    return next((int(row[1]) for row in rows if row[0] == name), 0)
