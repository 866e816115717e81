from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from demerge.evaluation.features.nets import FeatureNet, make_feature_net

ROOT = Path(__file__).resolve().parents[2]
PLACES = [
    ROOT.parent / "shared" / "assets",
    Path(os.environ.get("DEMERGE_ASSETS", ".")),
    Path.home() / ".cache/demerge-assets",
]


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    """Find a file or folder of real weights or data, or skip and say which."""

    def find(name: str) -> Path:
        for place in PLACES:
            if (place / name).exists():
                return place / name
        pytest.skip(f"{name} is neither in ../shared/assets nor in $DEMERGE_ASSETS")

    return find


@pytest.fixture(scope="session")
def digits_net() -> FeatureNet:
    return make_feature_net("digits-cnn")


@pytest.fixture(scope="session")
def noise() -> Callable[..., Tensor]:
    """Make noise images: noise(n, c, side, seed) -> uint8 [n c side side]."""

    def make(n: int, c: int = 1, side: int = 8, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (n, c, side, side), generator=generator, dtype=torch.uint8)

    return make
