"""How much memory is left, on this machine or on an accelerator."""

from __future__ import annotations

from pathlib import Path


def free_bytes(device: str = "cpu") -> int | None:
    """Return the bytes of a device that may still be used; None where that cannot be told."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return _free_on_this_machine() if device == "cpu" else None


def _free_on_this_machine() -> int | None:
    """Return the bytes that the machine and the control group this process is in still give."""
    try:
        free = _field(Path("/proc/meminfo"), "MemAvailable:") * 1024
    except OSError:
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            (group / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
        reclaimable = _field(group / "memory.stat", "inactive_file")
    except OSError:
        return free
    return min(free, int(limit) - int(used) + reclaimable) if limit.isdigit() else free


def _field(file: Path, name: str) -> int:
    rows = (line.split() for line in file.read_text().splitlines())
    return next((int(row[1]) for row in rows if row[0] == name), 0)
