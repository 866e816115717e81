from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demerge.data import load_images
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.evaluation.metrics.range_losses import BLOCKS, Interval, RangeLosses, range_losses
from demerge.timesteps import Partition


def test_change_by_hand() -> None:
    base = RangeLosses(("0000-0500", "0500-1000"), ((1.0, 3.0), (2.0, 2.0)))
    model = RangeLosses(("0000-0500", "0500-1000"), ((0.5, 1.5), (2.0, 3.0)))
    change = model.change(base)
    exact = change["0000-0500"]  # exactly half in every block: no doubt at all
    assert (exact.value, exact.se, exact.low, exact.high) == (-0.5, 0.0, -0.5, -0.5)
    other = change["0500-1000"]
    assert other.value == 0.25 and other.se > 0
    assert other.half == pytest.approx(12.7062 * other.se)  # t of one degree of freedom
    assert (exact.is_certain, other.is_certain) == (True, False)
    assert (exact.percent(), str(exact), str(other)) == ("-50.00 ± 0.00 %", "-0.5", "0.2 ± 3.2")
    assert str(Interval(0.1396, 0, 0.1353, 0.1439)) == "0.1396 ± 0.0043"
    assert base.means == {"0000-0500": 2.0, "0500-1000": 2.0}


def test_unlike_losses_do_not_compare() -> None:
    base = RangeLosses(("0000-1000",), ((1.0, 3.0),))
    with pytest.raises(UsageError, match="different ranges"):
        base.change(RangeLosses(("0000-0999",), ((1.0, 3.0),)))
    with pytest.raises(UsageError, match="do not fit"):
        RangeLosses(("a", "b"), ((1.0,),))
    others = RangeLosses(("0000-1000",), ((1.0, 3.0),), "64 draws of other images, seed 0")
    with pytest.raises(UsageError, match="or draws do not compare"):
        base.change(others)


def test_intervals_of_losses_and_of_paired_differences_cover_the_truth() -> None:
    """Blocks with a large part that both models share: the difference is far surer than a loss."""
    generator, name = torch.Generator().manual_seed(0), "0000-1000"
    covered, ratios, widths = [], [], []
    for _ in range(400):
        shared, a, b = torch.randn(3, BLOCKS, generator=generator, dtype=torch.float64)
        base = 1 + 0.1 * shared + 0.01 * a
        model = RangeLosses((name,), (tuple((0.98 * (1 + 0.1 * shared) + 0.01 * b).tolist()),))
        reference = RangeLosses((name,), (tuple(base.tolist()),))
        loss, change = model.intervals[name], model.change(reference)[name]
        covered.append(loss.low <= 0.98 <= loss.high)
        ratios.append(change.low <= -0.02 <= change.high)
        widths.append(loss.half / change.half)
    for share in (sum(covered) / 400, sum(ratios) / 400):
        assert 0.92 < share < 0.98
    assert min(widths) > 2


def test_common_random_numbers(tiny: Path) -> None:
    model, data = Diffusion.load(tiny), load_images("digits", split="test", limit=40)
    partition = Partition.uniform(model.T, 2)
    one = range_losses(model, data, partition, samples=64, batch_size=64)
    other = range_losses(model, data, partition, samples=64, batch_size=10)
    assert one.ranges == ("0000-0500", "0500-1000")
    assert one.is_paired(other) and data.fingerprint in one.draws
    assert not one.is_paired(range_losses(model, data, partition, samples=48))
    assert len(one.blocks[0]) == BLOCKS
    torch.testing.assert_close(torch.tensor(one.blocks), torch.tensor(other.blocks))
    assert range_losses(model, data, partition, samples=64, seed=1).blocks != one.blocks


def test_a_loss_close_to_its_definition(tiny: Path) -> None:
    """The golden-ratio timesteps and keyed noise estimate the same mean as plain random draws."""
    model, data = Diffusion.load(tiny), load_images("digits", split="test", limit=40)
    mine = range_losses(model, data, Partition.uniform(model.T, 1), samples=512).means["0000-1000"]
    generator = torch.Generator().manual_seed(0)
    x0 = data.floats(torch.randint(40, (512,), generator=generator).tolist())
    t = torch.randint(model.T, (512,), generator=generator)
    with torch.inference_mode():
        plain = model.loss(x0, torch.randn(x0.shape, generator=generator), t)
    assert abs(mine - float(plain.mean())) < 5 * float(plain.std()) / 512**0.5


def test_bad_requests_are_refused(tiny: Path) -> None:
    model, data = Diffusion.load(tiny), load_images("digits", split="test", limit=20)
    with pytest.raises(UsageError, match="the model has 1000"):
        range_losses(model, data, Partition.uniform(500, 2))
    with pytest.raises(UsageError, match="16 blocks"):
        range_losses(model, data, Partition.uniform(1000, 2), samples=15)
