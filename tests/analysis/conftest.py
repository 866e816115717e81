"""Conflict maps with known truth, and a linear model whose gradient is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from demerge.conflict import Array, ConflictMap, Origin
from demerge.data import ImageData
from demerge.timesteps import Partition

ORIGIN = Origin("model", "data", 10, "exact", "shared", False, "euclid", 4, 0)


@pytest.fixture
def map_of() -> Callable[..., ConflictMap]:
    """Make a map: map_of(gradients [N M D], T=1000, edges=None) -> ConflictMap."""

    def make(gradients: Array, T: int = 1000, edges: Sequence[int] | None = None) -> ConflictMap:
        gradients = np.asarray(gradients, dtype=np.float64)
        bins = (
            Partition.uniform(T, len(gradients))
            if edges is None
            else Partition.from_cuts(edges[-1], edges[1:-1])
        )
        return ConflictMap(
            bins,
            np.einsum("imd,jnd->imjn", gradients, gradients),
            np.linspace(9, -10, bins.total),
            ORIGIN,
        )

    return make


@pytest.fixture
def planted(map_of: Callable[..., ConflictMap]) -> Callable[..., ConflictMap]:
    """Make a map whose bins have one direction per segment: planted([3, 5, 8, ...], noise=0.1)."""

    def make(edges: Sequence[int], noise: float = 0.1, M: int = 8, seed: int = 0) -> ConflictMap:
        rng = np.random.default_rng(seed)
        directions = np.repeat(np.eye(len(edges) - 1, 12), np.diff(edges), axis=0)
        return map_of(directions[:, None] + noise * rng.standard_normal((edges[-1], M, 12)))

    return make


class Scale(nn.Module):
    """f(x, t) = theta * x, a parameter for each pixel."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(0.2, 0.9, side * side).reshape(1, side, side))
        self.config = FrozenDict(sample_size=side, in_channels=1)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return SimpleNamespace(sample=self.theta * x)


@pytest.fixture
def images() -> ImageData:
    """Seven grey images of 3 x 3."""
    from demerge.data.values import Array as Pixels

    values = np.random.default_rng(1).integers(0, 256, (7, 1, 3, 3), dtype=np.uint8)
    return ImageData("toy", "all", (1, 3, 3), "toy", Pixels(values), tuple(range(7)))


@pytest.fixture
def linear() -> Any:
    """A Diffusion around `Scale`, T = 30, epsilon prediction."""
    import diffusers

    from demerge.diffusion.model import Diffusion

    return Diffusion(
        Scale(3), diffusers.DDPMScheduler(num_train_timesteps=30, beta_start=0.01, beta_end=0.3)
    )
