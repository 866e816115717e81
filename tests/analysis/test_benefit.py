"""What decoupling promises: the known benefit of known gradients, nothing of noise, intervals that cover."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from demerge.analysis import lines, measure, summary
from demerge.analysis.cutting.benefit import Benefit, benefit
from demerge.analysis.cutting.evidence import Evidence
from demerge.analysis.cutting.needed import MOST, groups_needed
from demerge.analysis.cutting.segmentation import cut
from demerge.analysis.similarity import similarity
from demerge.analysis.study.known import Known
from demerge.conflict import Array, ConflictMap
from demerge.data import ImageData, load_images
from demerge.diffusion import Diffusion
from demerge.evaluate.losses import range_losses
from demerge.timesteps import Partition, TimestepRange


def of(map: ConflictMap, partition: Partition, **options: Any) -> Benefit:
    return benefit(Evidence.of(map), partition, **options)


def truth(mu: Array, widths: Array, edges: list[int]) -> tuple[list[float], float, float]:
    """Return b_R, J and the share by their definitions, from mean gradients."""
    rows = [slice(a, b) for a, b in pairwise(edges)]
    w = [float(widths[row].sum()) for row in rows]
    bars = [widths[row] @ mu[row] / w_R for row, w_R in zip(rows, w, strict=True)]
    joint = widths @ mu
    b = [float(bar @ bar - bar @ joint) for bar in bars]
    explained = sum(w_R * float(bar @ bar) for w_R, bar in zip(w, bars, strict=True))
    J = explained - float(joint @ joint)
    return b, J, J / explained


def test_exact_gradients_give_the_definition(map_of: Any) -> None:
    mu = np.random.default_rng(0).standard_normal((5, 6))
    edges = [0, 100, 150, 400, 700, 1000]
    map = map_of(np.repeat(mu[:, None], 6, axis=1), edges=edges)
    found = of(map, Partition.from_cuts(1000, [150, 700]))
    b, J, share = truth(mu, map.widths, [0, 2, 4, 5])
    assert [row.gain.value for row in found.ranges] == pytest.approx(b)
    assert (found.gain.value, found.share.value) == pytest.approx((J, share))
    assert found.gain.se == pytest.approx(0, abs=1e-9) and found.promised and not found.held_out
    w = [len(row.span) / 1000 for row in found.ranges]
    assert found.gain.value == pytest.approx(sum(w_R * row.gain.value for w_R, row in zip(w, found.ranges, strict=True)))


def test_cuts_within_bins_take_their_part(map_of: Any) -> None:
    mu = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = of(map_of(np.repeat(mu[:, None], 6, axis=1)), Partition.from_cuts(1000, [250]))
    (_, second), joint = (row.gain.value for row in found.ranges), np.array([0.5, 0.5])
    bar = np.array([1 / 3, 2 / 3])
    assert second == pytest.approx(bar @ bar - bar @ joint)


def test_one_direction_and_one_range_promise_nothing(planted: Any) -> None:
    alike = of(planted([0, 8]), Partition.uniform(1000, 4))
    assert not alike.promised and alike.sentence.startswith("no promise") and alike.share.value < 0.05
    single = of(planted([0, 4, 8]), Partition.uniform(1000, 1), method="gradient")
    assert not single.promised and "one range" in single.sentence and abs(single.gain.value) < 1e-12


def test_noise_promises_nothing(map_of: Any) -> None:
    maps = [map_of(np.random.default_rng(k).standard_normal((8, 6, 200))) for k in range(40)]
    found = [of(map, Partition.uniform(1000, 4)) for map in maps]
    assert sum(each.promised for each in found) <= 2
    hidden = next(each for each in found if np.isnan(each.share.value))
    assert "noise hides" in hidden.sentence and hidden.document()["share"]["value"] is None


def test_a_found_cut_is_judged_on_groups_that_did_not_choose_it(planted: Any) -> None:
    seen, honest = [], []
    for seed in range(12):
        evidence = Evidence.of(planted([0, 5, 16], noise=0.5, seed=seed))
        partition = cut(evidence.map, 3, minimum=1)
        judged = benefit(evidence, partition, "gradient", minimum=1)
        seen.append(benefit(evidence, partition).gain.value)
        honest.append(judged.gain.value)
        assert judged.held_out
    assert np.mean(honest) < np.mean(seen) - 0.002, "a cut that was found flatters itself"


@pytest.mark.parametrize("draws", ["shared", "independent"])
def test_intervals_cover_what_is_known(draws: str) -> None:
    known, partition, runs = (
        Known(strengths=(1.0,) * 8, neighbours=0.5, noise=8.0, dimensions=64),
        Partition.uniform(1000, 4),
        120,
    )
    maps = [known.measure(groups=8, batch_size=2, draws=draws, seed=seed) for seed in range(runs)]
    b, J, share = truth(known.means, maps[0].widths, [0, 2, 4, 6, 8])
    found = [of(map, partition) for map in maps]
    gains = np.array([each.gain.value for each in found])
    assert abs(gains.mean() - J) < 3 * gains.std() / runs**0.5, "biased"
    assert np.mean([each.gain.low <= J <= each.gain.high for each in found]) >= 0.9
    assert np.mean([each.share.low <= share <= each.share.high for each in found]) >= 0.88
    rows = np.array(
        [[row.gain.low <= value <= row.gain.high for row, value in zip(each.ranges, b, strict=True)] for each in found]
    )
    assert rows.mean(0).min() >= 0.88


@pytest.mark.slow
def test_predicted_benefit_is_what_short_training_gains() -> None:
    """SGD from an early base on digits: what experts gain over the joint model, predicted and measured; some 30 seconds."""
    torch.manual_seed(0)
    shipped, train, test = Diffusion.load("digits-base"), *(load_images("digits", split=split) for split in ("train", "test"))
    start = shipped.with_denoiser(type(shipped.denoiser).from_config(shipped.denoiser.config))  # type: ignore[attr-defined]
    whole, ranges = TimestepRange(0, 1000), Partition.uniform(1000, 4)
    base = trained(start, train, whole, torch.optim.Adam, 3e-4, 120)
    found = of(measure(base, train, bins=8, groups=8, batch_size=32), ranges)
    models = [trained(base, train, span, torch.optim.SGD, 0.02, 20) for span in (whole, *ranges)]
    origin, joint, *experts = ([*range_losses(model, test, ranges, samples=256).means.values()] for model in (base, *models))
    own = np.array(origin) - [losses[r] for r, losses in enumerate(experts)]
    gain = np.array(joint) - [losses[r] for r, losses in enumerate(experts)]
    correlation = float(np.corrcoef([row.gain.value for row in found.ranges], gain)[0, 1])
    share = float(gain.sum() / own.sum())
    print(f"correlation of b_R with the measured gain {correlation:.2f}; share {found.share} predicted, {share:.0%} measured")
    assert found.promised and correlation > 0.8 and abs(share - found.share.value) < 0.2


def trained(start: Diffusion, data: ImageData, span: TimestepRange, method: Any, rate: float, steps: int) -> Diffusion:
    model = start.with_denoiser(copy.deepcopy(start.denoiser))
    optimizer = method(model.denoiser.requires_grad_(True).parameters(), lr=rate)
    stream = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x0, condition = model.encode_from(data, torch.randint(len(data), (64,), generator=stream).tolist())
        t = span.start + (torch.rand(64, generator=stream) * len(span)).long()
        loss = model.loss(x0, torch.randn(x0.shape, generator=stream), t, condition).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.denoiser.requires_grad_(False)
    return model


# -- how many groups would do ----------------------------------------------------------------------------------------------


def test_the_groups_that_are_named_would_do() -> None:
    known = Known(strengths=(1.0,) * 4, neighbours=0.56, noise=30.0, dimensions=128)
    resolved = []
    for seed in range(20):
        map = known.measure(groups=8, batch_size=1, draws="independent", seed=seed)
        found = similarity(map)
        needed = groups_needed(map, found)
        assert (needed == map.M) == bool(found.resolved.all())
        resolved.append(
            similarity(known.measure(groups=needed, batch_size=1, draws="independent", seed=100 + seed)).resolved.mean()
        )
    assert np.mean(resolved) > 0.85


def test_a_bin_without_any_gradient_needs_more_than_can_be_said(map_of: Any) -> None:
    s = np.random.default_rng(0).standard_normal((3, 6, 20))
    s[1] = 0
    map = map_of(s)
    assert groups_needed(map, similarity(map)) == MOST
    assert "would do" not in lines(summary(map, 2))[0]
