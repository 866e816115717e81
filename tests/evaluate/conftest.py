from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from demerge.evaluate.features import FeatureNet, feature_net
from demerge.evaluate.losses import RangeLosses
from demerge.evaluate.protocol import Kind, Protocol, Scores

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
    return feature_net("digits-cnn")


@pytest.fixture(scope="session")
def noise() -> Callable[..., Tensor]:
    """Make noise images: noise(n, c, side, seed) -> uint8 [n c side side]."""

    def make(n: int, c: int = 1, side: int = 8, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (n, c, side, side), generator=generator, dtype=torch.uint8)

    return make


def protocol(**changes: object) -> Protocol:
    fields: dict[str, object] = {
        "features": "digits-cnn",
        "features_sha256": "ab" * 32,
        "preprocess": "grey 8x8",
        "distance": "FD[digits-cnn]",
        "dim": 64,
        "num_images": 2000,
        "reference": "digits test",
        "reference_n": 500,
        "reference_sha256": "cd" * 32,
        "sampler": "ddim",
        "steps": 50,
    }
    return Protocol(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def make_scores() -> Callable[..., list[Scores]]:
    """Make scores of one model, one for each distance: make_scores("ties", "merge", [7.1, 7.2, 7.0])."""

    def make(model: str, kind: Kind, distances: list[float], *, shift: float = 0.0, **changes: object) -> list[Scores]:
        losses = RangeLosses(("0000-0500", "0500-1000"), tuple(tuple(1 + shift + b / 100 for b in range(4)) for _ in range(2)))
        return [
            Scores(
                model,
                {"fd": value, "kid": value / 10, "precision": 0.9, "recall": 0.8, "density": 1.0, "coverage": 0.7},
                protocol(**changes),
                "ef" * 32,
                seed,
                kind,
                losses=None if kind == "real" else losses,
            )
            for seed, value in enumerate(distances)
        ]

    return make
