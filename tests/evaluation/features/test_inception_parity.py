"""Inception by a second, independent way: float64, normalization unfolded, blocks written out; distances by SciPy's sqrtm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from demerge.data import load_images
from demerge.evaluation.features.nets import make_feature_net
from demerge.evaluation.metrics.fid import frechet_distance, moments

pytestmark = pytest.mark.parity
WEIGHTS = "inception/pt_inception-2015-12-05.nofc.safetensors"
SUBSET = 6


class Oracle:
    """The network by its paper's figures, block by block, without the tables of the library."""

    def __init__(self, path: Path) -> None:
        self.w = {
            key: value.double()
            for key, value in load_file(path).items()
            if value.is_floating_point()
        }

    def conv(
        self, x: Tensor, name: str, stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> Tensor:
        w = self.w
        x = F.conv2d(x, w[f"{name}.conv.weight"], None, stride, padding)
        norm = (w[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *norm, training=False, eps=0.001))

    def average(self, x: Tensor) -> Tensor:
        ones = torch.ones_like(x[:1, :1])
        kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype)
        total = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).view_as(x)
        return total / F.conv2d(ones, kernel, padding=1)

    def block_a(self, x: Tensor, n: str) -> Tensor:
        five = self.conv(self.conv(x, f"{n}.branch5x5_1"), f"{n}.branch5x5_2", padding=2)
        three = self.conv(self.conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", padding=1)
        three = self.conv(three, f"{n}.branch3x3dbl_3", padding=1)
        return torch.cat(
            [
                self.conv(x, f"{n}.branch1x1"),
                five,
                three,
                self.conv(self.average(x), f"{n}.branch_pool"),
            ],
            1,
        )

    def block_b(self, x: Tensor, n: str) -> Tensor:
        double = self.conv(self.conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", padding=1)
        double = self.conv(double, f"{n}.branch3x3dbl_3", stride=2)
        return torch.cat(
            [self.conv(x, f"{n}.branch3x3", stride=2), double, F.max_pool2d(x, 3, 2)], 1
        )

    def block_c(self, x: Tensor, n: str) -> Tensor:
        wide, tall = (0, 3), (3, 0)
        seven = self.conv(self.conv(x, f"{n}.branch7x7_1"), f"{n}.branch7x7_2", padding=wide)
        seven = self.conv(seven, f"{n}.branch7x7_3", padding=tall)
        double = self.conv(x, f"{n}.branch7x7dbl_1")
        for i, padding in enumerate((tall, wide, tall, wide), 2):
            double = self.conv(double, f"{n}.branch7x7dbl_{i}", padding=padding)
        return torch.cat(
            [
                self.conv(x, f"{n}.branch1x1"),
                seven,
                double,
                self.conv(self.average(x), f"{n}.branch_pool"),
            ],
            1,
        )

    def block_d(self, x: Tensor, n: str) -> Tensor:
        three = self.conv(self.conv(x, f"{n}.branch3x3_1"), f"{n}.branch3x3_2", stride=2)
        seven = self.conv(self.conv(x, f"{n}.branch7x7x3_1"), f"{n}.branch7x7x3_2", padding=(0, 3))
        seven = self.conv(seven, f"{n}.branch7x7x3_3", padding=(3, 0))
        return torch.cat(
            [three, self.conv(seven, f"{n}.branch7x7x3_4", stride=2), F.max_pool2d(x, 3, 2)], 1
        )

    def block_e(self, x: Tensor, n: str, pooled: Tensor) -> Tensor:
        def fork(y: Tensor, name: str) -> list[Tensor]:
            return [
                self.conv(y, f"{name}a", padding=(0, 1)),
                self.conv(y, f"{name}b", padding=(1, 0)),
            ]

        double = self.conv(self.conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", padding=1)
        parts = [
            *fork(self.conv(x, f"{n}.branch3x3_1"), f"{n}.branch3x3_2"),
            *fork(double, f"{n}.branch3x3dbl_3"),
        ]
        return torch.cat(
            [self.conv(x, f"{n}.branch1x1"), *parts, self.conv(pooled, f"{n}.branch_pool")], 1
        )

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """The features of images uint8 [B 3 H W], preprocessed as pytorch-fid does."""
        x = (
            F.interpolate(images.double() / 255, (299, 299), mode="bilinear", align_corners=False)
            * 2
            - 1
        )
        x = self.conv(self.conv(x, "Conv2d_1a_3x3", stride=2), "Conv2d_2a_3x3")
        x = F.max_pool2d(self.conv(x, "Conv2d_2b_3x3", padding=1), 3, 2)
        x = F.max_pool2d(self.conv(self.conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.block_a(x, name)
        x = self.block_b(x, "Mixed_6a")
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self.block_c(x, name)
        x = self.block_d(x, "Mixed_7a")
        x = self.block_e(x, "Mixed_7b", self.average(x))
        x = self.block_e(x, "Mixed_7c", F.max_pool2d(x, 3, 1, 1))
        return x.mean((2, 3))


def distance_by_sqrtm(x: Tensor, y: Tensor) -> float:
    a, b = x.numpy(), y.numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr((S T)^(1/2)) is the nuclear norm of the product of the centred factors, which stays exact where S and T are singular
    factors = [(z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (a, b)]
    overlap = np.trace(
        scipy.linalg.sqrtm(factors[0] @ factors[1].T @ factors[1] @ factors[0].T).real
    )
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * overlap)


def test_features_and_distance_of_cifar10_agree(asset: Callable[[str], Path]) -> None:
    weights, folder = asset(WEIGHTS), asset("cifar10")
    oracle, net = (
        Oracle(weights),
        make_feature_net(f"inception:{weights}", preprocess="pytorch-fid"),
    )
    assert net.distance_name == "FID"
    images = [
        load_images(folder, split=split, limit=SUBSET).images(range(SUBSET))
        for split in ("train", "test")
    ]
    mine, theirs = [net(part) for part in images], [oracle(part) for part in images]
    for a, b in zip(mine, theirs, strict=True):
        assert float((a.double() - b).abs().max()) < 1e-4  # features range over 0..10
    distance = frechet_distance(*(moments([rows]) for rows in mine))
    assert distance == pytest.approx(distance_by_sqrtm(*theirs), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.slow
def test_the_known_fid_of_cifar10(asset: Callable[[str], Path]) -> None:
    """FID(train, test) = 3.15."""
    if not torch.cuda.is_available():
        pytest.skip("60,000 images through Inception need an accelerator")
    weights, folder = asset(WEIGHTS), asset("cifar10")
    net = make_feature_net(f"inception:{weights}", preprocess="torch-fidelity", device="cuda")
    parts = [load_images(folder, split=split) for split in ("train", "test")]
    train, test = (moments([net(part.images(range(len(part))))]) for part in parts)
    assert frechet_distance(train, test) == pytest.approx(3.15, abs=0.05)
