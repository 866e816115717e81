"""The small classifier behind `FD[digits-cnn]`: 64 features before the last linear map.

It knows scikit-learn's 8 x 8 digits and ships in the package. It was trained on the train split
alone; tests/evaluation/features/test_digits.py trains it again.

What it is good for: pure noise lies at a distance of 65 from the train split, a blur over 3 x 3
pixels at 90, a missing class at 3.4, the test split at 0.74. What it cannot see: faint noise
(standard deviation 16 of 255) lies at 0.40.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from demerge.errors import InputError
from demerge.reporting.images import check_uint8

ASSET = Path(__file__).resolve().parents[2] / "assets" / "digits-cnn.safetensors"
DIM = 64
CLASSES = 10


class DigitsCNN(nn.Module):
    """Four 3 x 3 convolutions; images [B 1 8 8] in [-1, 1] -> features [B 64] -> logits [B 10]."""

    def __init__(self) -> None:
        super().__init__()
        first = (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        second = (nn.Conv2d(32, DIM, 3, padding=1), nn.ReLU(), nn.Conv2d(DIM, DIM, 3, padding=1))
        layers = (*first, nn.ReLU(), nn.MaxPool2d(2), *second, nn.ReLU())
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Linear(DIM, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Return the features [B 64] of images [B 1 8 8]."""
        maps: Tensor = self.convolutions(x)
        return maps.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B 10] of images [B 1 8 8]."""
        logits: Tensor = self.head(self.features(x))
        return logits


def preprocess(images: Tensor) -> Tensor:
    """Turn images uint8 [B C H W] into [B 1 8 8] in [-1, 1]; colours are averaged."""
    check_uint8(images, channels=())
    grey = images.float().mean(1, keepdim=True) / 127.5 - 1
    if grey.shape[2:] == (8, 8):
        return grey
    return F.interpolate(grey, (8, 8), mode="bilinear", antialias=True)


def load_digits_cnn(path: str | Path = ASSET) -> DigitsCNN:
    """Load the classifier, by default the one that ships in the package."""
    net = DigitsCNN().eval().requires_grad_(False)
    try:
        net.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        what = f"{path}: not the digits classifier: {error}"
        raise InputError(what, fix="install demerge again") from error
    return net
