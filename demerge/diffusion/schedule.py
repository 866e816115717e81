"""The signal-to-noise ratio of a noise schedule, from its config alone, without diffusers.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps        SNR(t) = abar_t / (1 - abar_t), abar_t = prod_{s <= t} (1 - beta_s)
    x_t = (1 - sigma_t) x_0 + sigma_t eps                SNR(t) = ((1 - sigma_t) / sigma_t)^2          (flow matching)

Papers: DDPM (arXiv 2006.11239), cosine schedule (arXiv 2102.09672), zero terminal SNR (arXiv 2305.08891), rectified flow and
the shift of its timesteps (arXiv 2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MAX_BETA = 0.999
MAX_T = 100_000


def snr_of(config: Mapping[str, Any]) -> Tensor | None:
    """Return SNR(t) [T] float64 of a scheduler's config, t = 0 the least noise; None where the config does not tell."""
    try:
        T = int(config.get("num_train_timesteps", 1000))
        if not 0 < T <= MAX_T:
            return None
        snr = _of_flow(config, T) if _flows(config) else _of_betas(config, T)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return (
        snr
        if snr is not None
        and snr.shape == (T,)
        and bool(torch.isfinite(snr).all() and (snr >= 0).all())
        else None
    )


def _flows(config: Mapping[str, Any]) -> bool:
    return "Flow" in str(config.get("_class_name")) or bool(config.get("use_flow_sigmas"))


def _of_flow(config: Mapping[str, Any], T: int) -> Tensor | None:
    """Return the SNR of the shifted schedule; a shift that depends on the image's size leaves it open."""
    if config.get("use_dynamic_shifting"):
        return None
    shift = float(config.get("flow_shift" if config.get("use_flow_sigmas") else "shift") or 1.0)
    sigma = torch.arange(1, T + 1, dtype=torch.float64) / T
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return ((1 - sigma) / sigma) ** 2


def _of_betas(config: Mapping[str, Any], T: int) -> Tensor | None:
    betas = _betas(config, T)
    if betas is None:
        return None
    abar = (1 - betas).cumprod(0)
    if config.get("rescale_betas_zero_snr"):
        root = abar.sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return abar / (1 - abar)


def _betas(config: Mapping[str, Any], T: int) -> Tensor | None:
    """Return beta_t [T], None for a schedule of another kind."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    kind = config.get("beta_schedule")
    if kind == "squaredcos_cap_v2":
        level = (
            torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2)
            ** 2
        )
        return (1 - level[1:] / level[:-1]).clamp(max=MAX_BETA)
    if kind not in ("linear", "scaled_linear", "sigmoid"):
        return None
    first, last = float(config["beta_start"]), float(config["beta_end"])
    if kind == "linear":
        return torch.linspace(first, last, T, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, T, dtype=torch.float64) ** 2
    return torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid() * (last - first) + first
