"""How flow matching counts time: the shift, the densities of training draws, four conventions.

    x_t = (1 - sigma) x_0 + sigma eps        sigma = s u / (1 + (s - 1) u)        t = T sigma

u in [0, 1] is the time before the shift s > 0, and sigma the time after it; 1 is noise in both. A
shift that depends on the number of tokens is the same formula with s = exp(mu).

The same boundary between two experts is written in four ways:

    timestep    t = T sigma, after the shift: what a partition of demerge holds
    sigma       t / T, after the shift: diffusers' `boundary_ratio`
    index       1 - u, the share of the steps of a sampler, from the first one (noise) on
    unshifted   u, before the shift

With s = 1, `sigma` and `unshifted` are equal; with s = 5 the sigma 0.9 is u = 0.643 and the index
0.357. A trainer that draws u from a density and shifts it trains on sigma >= b with the
probability 1 - cdf(unshift(b, s)).

Sources: rectified flow, logit-normal and mode draws, the shift (arXiv 2403.03206, sections 3.1 and
5.3.2; its t is u here).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

N = TypeVar("N", float, "Tensor")
Convention = Literal["timestep", "sigma", "index", "unshifted"]
DensityName = Literal["uniform", "logit-normal", "mode"]
TrainerName = Literal[
    "musubi", "ai-toolkit", "diffusion-pipe", "diffsynth", "simpletuner", "kohya", "onetrainer"
]
MEANINGS: Mapping[Convention, str] = {
    "timestep": "t after the shift",
    "sigma": "sigma after the shift",
    "index": "share of a schedule's steps, from noise on",
    "unshifted": "u before the shift",
}
HALVINGS = 60  # of [0, 1], beyond what float64 resolves


def shift(u: N, s: float) -> N:
    """Return sigma of u, elementwise; 0 and 1 stay."""
    return s * u / (1 + (s - 1) * u)


def unshift(sigma: N, s: float) -> N:
    """Return u of sigma, elementwise: the inverse of `shift`, which is the shift 1 / s."""
    return sigma / (s - (s - 1) * sigma)


def to_sigma(value: N, convention: Convention, s: float = 1.0, T: int = 1000) -> N:
    """Return the sigma of a value in a convention, elementwise."""
    match convention:
        case "timestep":
            return value / T
        case "sigma":
            return value
        case "index":
            return shift(1 - value, s)
        case "unshifted":
            return shift(value, s)


def from_sigma(sigma: N, convention: Convention, s: float = 1.0, T: int = 1000) -> N:
    """Return sigma in a convention, elementwise: the inverse of `to_sigma`."""
    match convention:
        case "timestep":
            return sigma * T
        case "sigma":
            return sigma
        case "index":
            return 1 - unshift(sigma, s)
        case "unshifted":
            return unshift(sigma, s)


class Density(Protocol):
    """The density of u in training, before the shift."""

    def quantile(self, v: Tensor) -> Tensor:
        """Return u of v, elementwise, so that v uniform on [0, 1) makes draws of the density."""

    def cdf(self, u: Tensor) -> Tensor:
        """Return the probability of a draw below u, elementwise: the inverse of `quantile`."""


class DensityOptions(Protocol):
    """The options of a stage that name a density."""

    @property
    def density(self) -> DensityName:
        """Which one."""

    @property
    def logit_mean(self) -> float:
        """Mean of logit-normal."""

    @property
    def logit_std(self) -> float:
        """Standard deviation of logit-normal."""

    @property
    def mode_scale(self) -> float:
        """Scale of mode."""


def density_of(options: DensityOptions) -> Density:
    """Return the density that options name."""
    if options.density == "logit-normal":
        return LogitNormal(options.logit_mean, options.logit_std)
    return Mode(options.mode_scale) if options.density == "mode" else Uniform()


@dataclass(frozen=True, slots=True)
class Uniform:
    """u = v."""

    def quantile(self, v: Tensor) -> Tensor:
        """See `Density`."""
        return v

    def cdf(self, u: Tensor) -> Tensor:
        """See `Density`."""
        return u


@dataclass(frozen=True, slots=True)
class LogitNormal:
    """logit(u) = mean + std z with z standard normal; a positive mean draws more noise.

    diffusers' training scripts use u as an index of a schedule that begins with noise: their
    `--logit_mean` has the opposite sign.
    """

    mean: float = 0.0
    std: float = 1.0

    def quantile(self, v: Tensor) -> Tensor:
        """See `Density`."""
        import torch

        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(v))

    def cdf(self, u: Tensor) -> Tensor:
        """See `Density`."""
        import torch

        probability: Tensor = torch.special.ndtr((torch.logit(u) - self.mean) / self.std)
        return probability


@dataclass(frozen=True, slots=True)
class Mode:
    """u = v - scale (sin^2(pi v / 2) - v): more middling u for scale > 0, fewer for less.

    It ascends for -1 <= scale <= 2 / (pi - 2) = 1.75; diffusers' `--mode_scale` is 1.29.
    """

    scale: float = 1.29

    def quantile(self, v: Tensor) -> Tensor:
        """See `Density`."""
        return v - self.scale * ((math.pi / 2 * v).sin().square() - v)

    def cdf(self, u: Tensor) -> Tensor:
        """See `Density`; by bisection."""
        import torch

        target = u.double()
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            is_below = self.quantile(middle) < target
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return high.to(u.dtype)
