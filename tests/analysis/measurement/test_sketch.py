"""Count sketch: the sum it stands for, linear, of any layout, the same signs everywhere, inner products kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from demerge.analysis.measurement.backward import Backward
from demerge.analysis.measurement.sketch import CountSketch, K, signs
from demerge.randomness import key_of

WORD = 1 << 64


def reference(x: Tensor, sign: Tensor, k: int) -> Tensor:
    """h(x) [k] in float64 by scattered writes."""
    total = torch.zeros(k, dtype=torch.float64)
    return total.index_add(0, torch.arange(len(x)) % k, x.double() * sign.double())


def sign_by_hand(p: int, seed: int) -> int:
    """SplitMix64 in Python's integers."""
    z = ((p + 1) * 0x9E3779B97F4A7C15 + key_of(seed, "analysis-sketch")) % WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB % WORD
    return -1 if (z ^ z >> 31) >> 63 else 1


@pytest.mark.parametrize("D", [1, 6, 7, 8, 49, 50, 500, 1003])
def test_the_sketch_is_a_scattered_sum(D: int) -> None:
    sketch = CountSketch.of(D, seed=3, k=7)
    x = torch.randn(D, generator=torch.Generator().manual_seed(D))
    assert torch.allclose(
        sketch(x).double(), reference(x, sketch.signs, sketch.width), atol=1e-6 * float(x.norm())
    )
    pieces = torch.zeros(sketch.width, dtype=torch.float64)
    for start in range(0, D, 13):
        sketch.add(pieces, start, x[start : start + 13])
    assert torch.allclose(pieces.float(), sketch(x), atol=1e-6 * float(x.norm()))


def test_a_long_gradient() -> None:
    sketch, x = (
        CountSketch.of(20 * K + 11, seed=0),
        torch.randn(20 * K + 11, generator=torch.Generator().manual_seed(0)),
    )
    assert torch.allclose(sketch(x).double(), reference(x, sketch.signs, K), atol=1e-5)
    assert torch.equal(sketch(x), sketch(x))


def test_sketches_add_up() -> None:
    sketch = CountSketch.of(1000, seed=1, k=31)
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sketch(a + 2 * b), sketch(a) + 2 * sketch(b), atol=1e-4)
    assert torch.equal(sketch(a.half()), sketch(a.half().float()))


def test_signs_are_a_function_of_position_and_seed() -> None:
    assert signs(5, 9, 0).tolist() == [sign_by_hand(p, 0) for p in range(5, 9)]
    big = 3_000_000_000
    assert signs(big, big + 50, 7).tolist() == [sign_by_hand(p, 7) for p in range(big, big + 50)]
    assert torch.equal(signs(0, 100, 0)[40:], signs(40, 100, 0)) and not torch.equal(
        signs(0, 100, 0), signs(0, 100, 1)
    )
    assert torch.equal(
        CountSketch.of((1 << 20) + 5, 0).signs[-5:], signs(1 << 20, (1 << 20) + 5, 0)
    )


@pytest.mark.parametrize("lag", [1, 2, 64, K, 9 * K])
def test_signs_are_fair_and_independent(lag: int) -> None:
    sign = signs(0, 1 << 20, 0).double()
    limit = 4 / (len(sign) - lag) ** 0.5
    assert abs(float(sign.mean())) < limit
    assert abs(float((sign[lag:] * sign[:-lag]).mean())) < limit


def test_inner_products_stay() -> None:
    rng, k, errors = np.random.default_rng(0), 101, []
    x, y = torch.from_numpy(rng.standard_normal((2, 3000))).float()
    for seed in range(300):
        sketch = CountSketch.of(3000, seed, k=k)
        errors.append(float((sketch(x) @ sketch(y) - x @ y) / (x.norm() * y.norm())))
    assert abs(np.mean(errors)) < 4 / (k * 300) ** 0.5 and np.std(errors) < (2 / k) ** 0.5


class Layers(nn.Module):
    """A convolution, an unused layer and a tied linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.unused = nn.Linear(2, 2)
        self.linear = nn.Linear(4, 4)
        self.tied = self.linear

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.convolution(x).mean((2, 3))
        tied: Tensor = self.tied(self.linear(hidden))
        return tied.square().mean()


@pytest.mark.parametrize("mode", ["flat", "hooks"])
@pytest.mark.parametrize("which", ["all", "linear.weight", "convolution"])
def test_pieces_lie_where_the_logical_order_says(mode: str, which: str) -> None:
    """A channels_last model has gradients of another memory order, and the same coordinates."""
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(2, 3, 6, 6)
    model(x).backward()
    chosen = [p for name, p in model.named_parameters() if which == "all" or which in name]
    truth = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in chosen]
    )
    model.zero_grad()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    backward = Backward(model, which, mode)
    found = torch.zeros(backward.D)

    def put(start: int, values: Tensor) -> None:
        assert (
            sum(p.grad is not None for p in model.parameters()) <= 1
        )  # hooks free each as soon as it is used
        found[start : start + len(values)] = values

    for _ in range(2):
        backward(model(x.contiguous(memory_format=torch.channels_last)), put)
        assert len(truth) == backward.D and torch.allclose(found, truth, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())
    assert not model.unused.weight.requires_grad or which == "all"


@pytest.mark.gpu
def test_an_accelerator_makes_the_same_sketch() -> None:
    here, there = CountSketch.of(3 * K, 0), CountSketch.of(3 * K, 0, device="cuda")
    x = torch.randn(3 * K, generator=torch.Generator().manual_seed(0))
    assert torch.equal(here.signs, there.signs.cpu()) and torch.allclose(
        here(x), there(x.cuda()).cpu(), atol=1e-5
    )


def test_k_is_prime() -> None:
    assert all(K % n for n in range(2, math.isqrt(K) + 1)) and K < 1 << 16
