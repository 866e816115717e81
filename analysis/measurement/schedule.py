"""The noise schedule that a map was measured on: log SNR(t) of all T timesteps, and whether a model has the same.

Bins of timesteps, and ranges cut from them, mean something else on another schedule, whatever the weights.
"""

from __future__ import annotations

from pathlib import Path

from demerge.conflict import Array, ConflictMap
from demerge.diffusion import schedule
from demerge.diffusion.loading import find_pipeline, load_scheduler
from demerge.diffusion.model import Diffusion
from demerge.errors import InputError
from demerge.storage.layout import read_index


def log_snr(model: Diffusion) -> Array:
    """Return log SNR(t) [T] of a model's schedule, within +-20."""
    return schedule.log_snr(model.alphas_cumprod).numpy()


def described(log_snr: Array) -> str:
    """Return a schedule in words that tell it from others."""
    ends = f"{log_snr[0]:.2f} to {log_snr[-1]:.2f}, {log_snr.mean():.3f} on average"
    return f"of {len(log_snr)} timesteps with log SNR {ends}"


def check_same_schedule(map: ConflictMap, path: Path, model: str) -> None:
    """Refuse a map that was measured on another schedule than the model's, which is read without its weights.

    A model that is weights alone has no schedule, and nothing is refused.

    Raises:
        InputError: naming both schedules.
    """
    try:
        folder = find_pipeline(model)
    except InputError:
        return
    scheduler = load_scheduler(folder, read_index(folder))
    there, here = (
        described(map.log_snr),
        described(schedule.log_snr(scheduler.alphas_cumprod).numpy()),
    )
    if there != here:
        raise InputError(
            f"{path} was measured on a schedule {there}, {model} has one {here}",
            fix="name the base that the map was measured on, or measure this one with `demerge analyze`",
        )
