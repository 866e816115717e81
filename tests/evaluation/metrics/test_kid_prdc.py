from __future__ import annotations

import math

import pytest
import torch

from demerge.errors import UsageError
from demerge.evaluation.metrics.kid import kid, mmd2
from demerge.evaluation.metrics.prdc import prdc, radii


def slow_mmd2(x: torch.Tensor, y: torch.Tensor) -> float:
    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_mmd_agrees_with_its_double_sum() -> None:
    x, y = torch.randn(6, 3).double(), torch.randn(5, 3).double() + 1
    assert mmd2(x, y) == pytest.approx(slow_mmd2(x, y))


def test_kid_is_unbiased_at_zero_and_sees_a_shift() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(1000, 8), torch.randn(1000, 8)
    same, shifted = kid(x, y, block=100), kid(x, y + 0.5, block=100)
    assert same.blocks == 10
    assert abs(same.value) < 3 * same.error
    assert shifted.value > 10 * shifted.error


def test_kid_with_one_block_has_no_error() -> None:
    result = kid(torch.randn(20, 4), torch.randn(30, 4))
    assert result.blocks == 1
    assert math.isnan(result.error)
    with pytest.raises(UsageError, match="n, m >= 2"):
        kid(torch.randn(1, 4), torch.randn(9, 4))


def test_prdc_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    generated = torch.tensor([[0.5], [50.0], [51.0], [52.0]])
    assert radii(real, 1).tolist() == [1, 1, 1, 8]
    result = prdc(real, generated, k=1)
    assert result.precision == 1 / 4  # only 0.5 lies in a ball of real images
    assert result.density == (2 + 0 + 0 + 0) / 4  # it lies in the balls around 0 and 1
    assert result.coverage == 2 / 4  # those balls hold a generated image
    assert result.recall == 4 / 4  # the ball of 0.5 reaches 49.5 far


def test_prdc_of_a_set_with_itself_and_with_a_far_one() -> None:
    x = torch.randn(200, 5)
    same, far = prdc(x, x), prdc(x, x + 100)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density > 0.99
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    assert prdc(x, x, reach=radii(x, 5)) == same


def test_prdc_needs_more_than_k() -> None:
    with pytest.raises(UsageError, match="k = 5"):
        prdc(torch.randn(5, 2), torch.randn(9, 2))
