"""The noise schedule that a map was measured on: log SNR(t) of all T timesteps.

Bins of timesteps, and ranges of them, mean something else on another schedule.
"""

from __future__ import annotations

from pathlib import Path

from demerge.conflict import Array, ConflictMap
from demerge.diffusion import schedule
from demerge.diffusion.loading import find_pipeline, load_scheduler
from demerge.diffusion.model import Diffusion
from demerge.errors import InputError


def log_snr(model: Diffusion) -> Array:
    """Return log SNR(t) [T] of a model's schedule, within +-20."""
    return schedule.log_snr(model.alphas_cumprod).numpy()


def describe_schedule(log_snr: Array) -> str:
    """Return a schedule in words that tell it from others."""
    ends = f"{log_snr[0]:.2f} to {log_snr[-1]:.2f}, {log_snr.mean():.3f} on average"
    return f"of {len(log_snr)} timesteps with log SNR {ends}"


def check_same_schedule(map: ConflictMap, path: Path, model: str) -> None:
    """Check that a map was measured on the model's schedule; the model's weights are not read.

    Weights alone have no schedule, and pass.
    """
    try:
        folder = find_pipeline(model)
    except InputError:
        return
    scheduler = load_scheduler(folder)
    of_map = describe_schedule(map.log_snr)
    of_model = describe_schedule(schedule.log_snr(scheduler.alphas_cumprod).numpy())
    if of_map != of_model:
        what = f"{path} was measured on a schedule {of_map}, {model} has one {of_model}"
        fix = "name the base of the map, or measure this one with `demerge analyze`"
        raise InputError(what, fix=fix)
