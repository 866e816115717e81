"""The signal-to-noise ratio of a noise schedule, of its abar or of its config alone.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps        SNR(t) = abar_t / (1 - abar_t)
                                                         abar_t = prod_{s <= t} (1 - beta_s)
    x_t = (1 - sigma_t) x_0 + sigma_t eps                SNR(t) = ((1 - sigma_t) / sigma_t)^2

The second line is flow matching.

Papers: DDPM (arXiv 2006.11239), cosine schedule (arXiv 2102.09672), zero terminal SNR (arXiv
2305.08891), rectified flow and the shift of its timesteps (arXiv 2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MAX_BETA = 0.999
MAX_T = 100_000
MAX_LOG_SNR = 20.0  # a schedule that ends in pure noise has log SNR = -inf


def is_flow(config: Mapping[str, Any], name: str = "") -> bool:
    """Return whether a scheduler's config, or its class, is of flow matching."""
    return "Flow" in (name or str(config.get("_class_name"))) or bool(config.get("use_flow_sigmas"))


def flow_sigmas(T: int) -> Tensor:
    """Return sigma in the middle of each [t, t + 1), [T] float64; sigma is t / T."""
    return (torch.arange(T, dtype=torch.float64) + 0.5) / T


def shift_of(config: Mapping[str, Any], tokens: int) -> float:
    """Return the shift s of a flow's schedule; sigma = s u / (1 + (s - 1) u).

    With `use_dynamic_shifting` it depends on the length of the sequence: mu grows linearly with it,
    and s is exp(mu), or mu itself with the `time_shift_type` linear.
    """
    if not config.get("use_dynamic_shifting"):
        name = "flow_shift" if config.get("use_flow_sigmas") else "shift"
        return float(config.get(name) or 1.0)
    mu = dynamic_mu(config, tokens)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def find_shift(config: Mapping[str, Any]) -> float | None:
    """Return the shift of a scheduler's config; None if it is no flow or depends on the images."""
    if not is_flow(config) or config.get("use_dynamic_shifting"):
        return None
    return shift_of(config, 0)


def dynamic_mu(config: Mapping[str, Any], tokens: int) -> float:
    """Return mu of a sequence of so many tokens."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(first + (last - first) * (tokens - low) / (high - low))


def snr(abar: Tensor) -> Tensor:
    """Return SNR(t) [T] of abar [T]."""
    return abar / (1 - abar)


def log_snr(abar: Tensor) -> Tensor:
    """Return log SNR(t) [T] float64 of abar [T], within +-20."""
    return snr(abar.double()).log().clamp(-MAX_LOG_SNR, MAX_LOG_SNR)


def snr_of(config: Mapping[str, Any]) -> Tensor | None:
    """Return SNR(t) [T] float64 of a scheduler's config; None if the config does not tell it.

    t = 0 is the least noise.
    """
    try:
        T = int(config.get("num_train_timesteps", 1000))
        if not 0 < T <= MAX_T:
            return None
        if is_flow(config):
            sigma = flow_sigmas(T)
            return ((1 - sigma) / sigma) ** 2
        ratio = _of_betas(config, T)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        return None
    if ratio is None or ratio.shape != (T,):
        return None
    return ratio if bool(torch.isfinite(ratio).all() and (ratio >= 0).all()) else None


def _of_betas(config: Mapping[str, Any], T: int) -> Tensor | None:
    betas = _betas(config, T)
    if betas is None:
        return None
    abar = (1 - betas).cumprod(0)
    if config.get("rescale_betas_zero_snr"):
        root = abar.sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return snr(abar)


def _betas(config: Mapping[str, Any], T: int) -> Tensor | None:
    """Return beta_t [T]; None for an unknown kind of schedule."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    kind = config.get("beta_schedule")
    if kind == "squaredcos_cap_v2":
        phase = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008
        level = torch.cos(phase * math.pi / 2) ** 2
        return (1 - level[1:] / level[:-1]).clamp(max=MAX_BETA)
    if kind not in ("linear", "scaled_linear", "sigmoid"):
        return None
    first, last = float(config["beta_start"]), float(config["beta_end"])
    if kind == "linear":
        return torch.linspace(first, last, T, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, T, dtype=torch.float64) ** 2
    return torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid() * (last - first) + first
