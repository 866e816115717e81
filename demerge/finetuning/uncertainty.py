"""Loss weights that are learned: `--loss-weight uncertainty` (EDM2, arXiv 2312.02696, Eq. 21).

    loss = exp(-u(t)) |y - f|^2 + u(t),      u(t) = b . phi(log SNR(t))

At the best u, exp(u(t)) is the error at t, so that every timestep counts alike in the relative
error. phi are 64 random Fourier features of a quarter of log SNR, as in EDM2, from a fixed seed.
b starts at 0, where the loss is the plain one. u is trained with the expert and dropped at its end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from demerge.diffusion.model import Diffusion
from demerge.diffusion.schedule import log_snr
from demerge.randomness import normal, uniform

FEATURES = 64


class Uncertainty(nn.Module):
    """u(t) as a linear function of Fourier features of log SNR(t)."""

    features: Tensor

    def __init__(self, model: Diffusion) -> None:
        super().__init__()
        samples = range(FEATURES)
        frequency = normal((), 0, "uncertainty frequency", samples=samples)
        phase = uniform(0, "uncertainty phase", samples=samples).float()
        x = log_snr(model.alphas_cumprod).float() / 4
        features = (2 * math.pi * (x[:, None] * frequency + phase)).cos() * math.sqrt(2)
        self.register_buffer("features", features, persistent=False)
        self.weight = nn.Parameter(torch.zeros(FEATURES))
        self.to(model.device)

    def forward(self, errors: Tensor, t: Tensor) -> Tensor:
        """Return exp(-u) error + u for errors [B] at t [B]."""
        u = self.features[t.long()] @ self.weight / math.sqrt(FEATURES)
        return errors * (-u).exp() + u
