"""The noise schedule that a map was measured on: log SNR(t) of all T timesteps, and whether a model has the same.

Bins of timesteps, and ranges cut from them, mean something else on another schedule, whatever the weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from demerge.conflict import Array, ConflictMap
from demerge.diffusion.loading import load_scheduler, resolve
from demerge.diffusion.model import Diffusion
from demerge.errors import InputError
from demerge.storage.layout import read_index

MAX_LOG_SNR = 20.0  # schedules that end in pure noise have log SNR = -inf


def log_snr(model: Diffusion) -> Array:
    """Return log SNR(t) [T] of a model's schedule, within +-20."""
    return _log_snr(model.alphas_cumprod.numpy())


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
        folder = resolve(model)
    except InputError:
        return
    scheduler = load_scheduler(folder, read_index(folder))
    there, here = (
        described(map.log_snr),
        described(_log_snr(scheduler.alphas_cumprod.double().numpy())),
    )
    if there != here:
        raise InputError(
            f"{path} was measured on a schedule {there}, {model} has one {here}",
            fix="name the base that the map was measured on, or measure this one with `demerge analyze`",
        )


def _log_snr(abar: Array) -> Array:
    with np.errstate(divide="ignore"):
        found: Array = np.clip(np.log(abar / (1 - abar)), -MAX_LOG_SNR, MAX_LOG_SNR)
    return found
