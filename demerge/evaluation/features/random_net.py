"""A convolutional net with random weights, which needs no file and knows no data set.

    image -> 32 x 32 RGB in [-1, 1] -> 3 x [conv 3 x 3, ReLU, mean pool 2] -> means over space [224]

Weights are normal with variance 2 / fan-in, keyed by the stage, hence the same everywhere. Such
features see blur, noise, colour and texture. They are nearly blind to missing classes, and their
distances compare with nothing but each other.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demerge.randomness import normal
from demerge.reporting.images import check_uint8

WIDTHS = (3, 32, 64, 128)
DIM = sum(WIDTHS[1:])
SIDE = 32


class RandomNet(nn.Module):
    """Three random stages; images [B 3 32 32] in [-1, 1] -> features [B 224]."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.ParameterList()
        for i, (fan_in, width) in enumerate(pairwise(WIDTHS)):
            weight = normal((width, fan_in, 3, 3), 0, "random-net", samples=[i])[0]
            self.filters.append(nn.Parameter(weight * (2 / (9 * fan_in)) ** 0.5, False))

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights."""
        parts = [weight.detach().cpu().numpy().tobytes() for weight in self.filters]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B 3 32 32] to [B 224]."""
        means = []
        for weight in self.filters:
            x = F.conv2d(x, weight, padding=1).relu()
            means.append(x.mean((2, 3)))
            x = F.avg_pool2d(x, 2)
        return torch.cat(means, 1)


def preprocess(images: Tensor) -> Tensor:
    """Turn images uint8 [B 1|3 H W] into [B 3 32 32] in [-1, 1], bilinear with antialias."""
    check_uint8(images)
    x = images.expand(-1, 3, -1, -1).float() / 127.5 - 1
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
