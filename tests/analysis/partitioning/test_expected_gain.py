"""What decoupling promises: the known benefit of known gradients, nothing of noise, intervals that cover."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from demerge.analysis import MeasurementOptions, measure, summarize
from demerge.analysis.partitioning.expected_gain import ExpectedGain, expected_gain
from demerge.analysis.partitioning.map_reading import Reading
from demerge.analysis.partitioning.resolution import MOST_GROUPS, sample_size
from demerge.analysis.similarity import similarity
from demerge.analysis.study.known import KnownProblem
from demerge.conflict import Array, ConflictMap
from demerge.data import ImageData, load_images
from demerge.diffusion.model import Diffusion
from demerge.evaluation.metrics.range_losses import range_losses
from demerge.timesteps import Partition, TimestepRange


def of(map: ConflictMap, partition: Partition, **options: Any) -> ExpectedGain:
    return expected_gain(Reading(map), partition, **options)


def truth(
    mu: Array, widths: Array, edges: list[int]
) -> tuple[list[float], list[float], float, float, float, float]:
    """Return 1 - cos and |gbar_R| of each range, J, its share, and those of plain steps, by their definitions."""
    rows = [slice(a, b) for a, b in pairwise(edges)]
    w = np.array([float(widths[row].sum()) for row in rows])
    bars = [widths[row] @ mu[row] / w_R for row, w_R in zip(rows, w, strict=True)]
    joint, lengths = widths @ mu, np.array([float(np.linalg.norm(bar)) for bar in bars])
    missed = [
        1 - float(bar @ joint) / n / float(np.linalg.norm(joint))
        for bar, n in zip(bars, lengths, strict=True)
    ]
    J = float(w @ lengths - np.linalg.norm(joint))
    sgd = 1 - float(joint @ joint) / float(w @ lengths**2)
    return (
        missed,
        [*lengths],
        J,
        J / float(w @ lengths),
        sgd,
        1 - float(w @ lengths) ** 2 / float(w @ lengths**2),
    )


def test_exact_gradients_give_the_definition(map_of: Any) -> None:
    mu = np.random.default_rng(0).standard_normal((5, 6))
    edges = [0, 100, 150, 400, 700, 1000]
    map = map_of(np.repeat(mu[:, None], 6, axis=1), edges=edges)
    found = of(map, Partition.from_cuts(1000, [150, 700]))
    missed, lengths, J, share, sgd, by_length = truth(mu, map.widths, [0, 2, 4, 5])
    assert [row.missed.value for row in found.ranges] == pytest.approx(missed)
    w = np.array([len(row.span) / 1000 for row in found.ranges])
    assert [row.length.value for row in found.ranges] == pytest.approx(
        np.array(lengths) / (w @ lengths)
    )
    assert (found.gain.value, found.share.value) == pytest.approx((J, share))
    assert (found.sgd.value, found.sgd_length.value) == pytest.approx((sgd, by_length))
    assert (
        found.gain.se == pytest.approx(0, abs=1e-9) and found.is_promised and not found.is_held_out
    )
    own = np.array([row.missed.value * row.length.value for row in found.ranges])
    assert share == pytest.approx(w @ own), "the ranges add up"


def test_cuts_within_bins_take_their_part(map_of: Any) -> None:
    mu = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = of(map_of(np.repeat(mu[:, None], 6, axis=1)), Partition.from_cuts(1000, [250]))
    bar, joint = np.array([1 / 3, 2 / 3]), np.array([0.5, 0.5])
    cosine = bar @ joint / np.linalg.norm(bar) / np.linalg.norm(joint)
    assert found.ranges[1].missed.value == pytest.approx(1 - cosine)


def test_a_doubt_forbids_a_promise(planted: Any) -> None:
    map = planted([0, 4, 8])
    assert of(map, Partition.uniform(1000, 2)).is_promised
    doubted = of(map, Partition.uniform(1000, 2), doubt="too little is resolved")
    assert (
        not doubted.is_promised
        and doubted.sentence == "no gain is predicted: too little is resolved"
    )


@pytest.mark.parametrize("draws", ["shared", "independent"])
@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_parallel_gradients_of_unequal_length_promise_nothing(
    map_of: Any, draws: str, noise: float
) -> None:
    """Plain steps would miss a lot of them, by length alone; 100 maps of little or much noise."""
    rng, lengths, runs = (
        np.random.default_rng(0),
        np.array([0.3, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 6.0]),
        100,
    )
    promises, length, direction = 0, [], []
    for _ in range(runs):
        z = rng.standard_normal((8, 8, 100)) / 10
        z = 0.6 * z + 0.8 * rng.standard_normal((1, 8, 100)) / 10 if draws == "shared" else z
        found = of(
            map_of(lengths[:, None, None] * (np.eye(1, 100) + noise * z)),
            Partition.uniform(1000, 4),
        )
        promises += found.is_promised
        length.append(found.sgd_length.value)
        direction.append(found.share.value)
    assert promises <= 0.05 * runs
    assert np.median(length) > 0.4 and abs(np.median(direction)) < 0.03


def test_parallel_gradients_are_no_conflict_to_any_report(map_of: Any) -> None:
    lengths = np.array([0.3, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 6.0])
    promised = 0
    for seed in range(20):
        noise = 0.5 * np.random.default_rng(seed).standard_normal((8, 8, 100)) / 10
        map = map_of(lengths[:, None, None] * (np.eye(1, 100) + noise))
        summary = summarize(Reading(map), 4)
        promised += summary.verdict.is_promised or summary.expected_gain.is_promised
    assert promised <= 1


def test_noise_of_a_batch_shortens_the_steps(map_of: Any) -> None:
    """share_B from means and noise that are known: own steps of unlike noise, and a joint one that mixes ranges."""
    rng, mu, sd, M, B = (
        np.random.default_rng(0),
        np.array([[1.0, 0.0], [0.0, 2.0]]),
        np.array([0.25, 0.75]),
        100,
        4,
    )
    mu, D = np.pad(mu, ((0, 0), (0, 798))), 800
    s = mu[:, None] + sd[:, None, None] * rng.standard_normal((2, M, D)) / B**0.5
    found = of(map_of(s), Partition.uniform(1000, 2))  # its batch size is 4
    own, noise, joint = (mu**2).sum(1), sd**2 * D, mu.mean(0)
    gains = own / np.sqrt(own + noise / 64)
    all_noise = (own + noise).mean() - joint @ joint
    expected = 1 - joint @ joint / np.sqrt(joint @ joint + all_noise / 64) / gains.mean()
    assert found.batch.value == pytest.approx(expected, abs=0.03)
    assert (
        found.share.value == pytest.approx(1 - np.linalg.norm(joint) / 1.5, abs=0.03)
        and found.batch.value > found.share.value
    )


@pytest.mark.parametrize("steps", ["fixed length", "plain"])
def test_steps_on_a_quadratic_gain_what_is_predicted(map_of: Any, steps: str) -> None:
    """f_R(x) = |x - c_R|^2 / 2: short steps from 0, separate and joint, gain what the map of their gradients says."""
    c = np.random.default_rng(3).standard_normal((4, 30)) * np.array([4.0, 1.0, 1.0, 0.5])[:, None]
    found = of(map_of(np.repeat(-c[:, None], 6, axis=1)), Partition.uniform(1000, 4))

    def after(gradient: Any) -> Array:
        x = np.zeros(30)
        for _ in range(20):
            g = gradient(x)
            x -= 1e-4 * (g / np.linalg.norm(g) if steps == "fixed length" else g)
        return x

    losses = lambda x: ((x - c) ** 2).sum(1) / 2  # noqa: E731
    origin, joint = losses(np.zeros(30)), losses(after(lambda x: x - c.mean(0)))
    own = np.array([losses(after(lambda x, r=r: x - c[r]))[r] for r in range(4)])
    measured = (joint - own).sum() / (origin - own).sum()
    predicted, other = (
        (found.share, found.sgd) if steps == "fixed length" else (found.sgd, found.share)
    )
    assert (
        measured == pytest.approx(predicted.value, abs=0.005) and abs(measured - other.value) > 0.1
    )


def test_one_direction_and_one_range_promise_nothing(planted: Any) -> None:
    alike = of(planted([0, 8]), Partition.uniform(1000, 4))
    assert (
        not alike.is_promised
        and alike.sentence.startswith("no gain is predicted")
        and alike.share.value < 0.05
    )
    single = of(planted([0, 4, 8]), Partition.uniform(1000, 1), method="gradient")
    assert (
        not single.is_promised and "one range" in single.sentence and abs(single.gain.value) < 1e-12
    )


def test_noise_promises_nothing(map_of: Any) -> None:
    maps = [map_of(np.random.default_rng(k).standard_normal((8, 6, 200))) for k in range(40)]
    found = [of(map, Partition.uniform(1000, 4)) for map in maps]
    assert sum(each.is_promised for each in found) <= 2
    hidden = next(each for each in found if np.isnan(each.share.value))
    assert "noise hides" in hidden.sentence and hidden.document()["share"]["value"] is None


def test_a_found_cut_is_judged_on_groups_that_did_not_choose_it(planted: Any) -> None:
    seen, honest = [], []
    for seed in range(12):
        reading = Reading(planted([0, 5, 16], noise=0.5, seed=seed), minimum=1)
        partition = reading.partition(3)
        judged = expected_gain(reading, partition, "gradient")
        seen.append(expected_gain(reading, partition).gain.value)
        honest.append(judged.gain.value)
        assert judged.is_held_out
    assert np.mean(honest) < np.mean(seen) - 0.002, "a cut that was found flatters itself"


@pytest.mark.parametrize("draws", ["shared", "independent"])
def test_intervals_cover_what_is_known(draws: str) -> None:
    known, partition, runs = (
        KnownProblem(strengths=(1.0,) * 8, neighbours=0.5, noise=8.0, dimensions=64),
        Partition.uniform(1000, 4),
        120,
    )
    maps = [known.measure(groups=8, batch_size=2, draws=draws, seed=seed) for seed in range(runs)]
    missed, _, J, share, sgd, _ = truth(known.means, maps[0].widths, [0, 2, 4, 6, 8])
    found = [of(map, partition) for map in maps]
    gains = np.array([each.gain.value for each in found])
    assert abs(gains.mean() - J) < 0.05 * J + 3 * gains.std() / runs**0.5, (
        "roots of unbiased squares are biased a little"
    )
    assert np.mean([each.gain.low <= J <= each.gain.high for each in found]) >= 0.9
    assert np.mean([each.share.low <= share <= each.share.high for each in found]) >= 0.88
    assert np.mean([each.sgd.low <= sgd <= each.sgd.high for each in found]) >= 0.88
    rows = np.array(
        [
            [
                row.missed.low <= value <= row.missed.high
                for row, value in zip(each.ranges, missed, strict=True)
            ]
            for each in found
        ]
    )
    assert rows.mean(0).min() >= 0.88


@pytest.mark.slow
def test_predicted_benefit_is_what_first_adamw_steps_gain() -> None:
    """AdamW from an early base on digits: what experts gain over the joint model, predicted and measured; some minutes."""
    torch.manual_seed(0)
    shipped, train, test = (
        Diffusion.load("digits-base"),
        *(load_images("digits", split=split) for split in ("train", "test")),
    )
    start = shipped.with_denoiser(type(shipped.denoiser).from_config(shipped.denoiser.config))  # type: ignore[attr-defined]
    whole, ranges = TimestepRange(0, 1000), Partition.from_cuts(1000, [100, 300, 900])
    base = trained(start, train, whole, torch.optim.AdamW, 1e-3, 400, decay=True)
    found = of(measure(base, train, MeasurementOptions(bins=10, groups=12, batch_size=128)), ranges)
    origin = np.array([*range_losses(base, test, ranges, samples=512).means.values()])
    w = np.array([len(span) / 1000 for span in ranges])
    models = [trained(base, train, span, torch.optim.AdamW, 5e-5, 40) for span in (whole, *ranges)]
    joint, *experts = (
        [*range_losses(model, test, ranges, samples=512).means.values()] for model in models
    )
    own = origin - np.array([losses[r] for r, losses in enumerate(experts)])
    share = float(1 - w @ (origin - joint) / (w @ own))
    print(
        f"fixed length {found.share}, batches of 64 {found.batch}, plain {found.sgd}; {share:.0%} measured"
    )
    assert found.is_promised and abs(share - found.batch.value) < 0.12


def trained(
    start: Diffusion,
    data: ImageData,
    span: TimestepRange,
    method: Any,
    rate: float,
    steps: int,
    decay: bool = False,
) -> Diffusion:
    model = start.with_denoiser(copy.deepcopy(start.denoiser))
    optimizer = method(model.denoiser.requires_grad_(True).parameters(), lr=rate)
    stream = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (
            0.5 + 0.5 * np.cos(np.pi * step / steps) if decay else 1
        )
        x0, condition = model.encode_from(
            data, torch.randint(len(data), (64,), generator=stream).tolist()
        )
        t = span.start + (torch.rand(64, generator=stream) * len(span)).long()
        loss = model.loss(x0, torch.randn(x0.shape, generator=stream), t, condition).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.denoiser.requires_grad_(False)
    return model


# -- how many groups would do ----------------------------------------------------------------------------------------------


def test_the_groups_that_are_named_would_do() -> None:
    known = KnownProblem(strengths=(1.0,) * 4, neighbours=0.56, noise=30.0, dimensions=128)
    resolved = []
    for seed in range(20):
        map = known.measure(groups=8, batch_size=1, draws="independent", seed=seed)
        found = similarity(map)
        needed = sample_size(map, found)
        assert (needed == map.M) == bool(found.resolved.all())
        resolved.append(
            similarity(
                known.measure(groups=needed, batch_size=1, draws="independent", seed=100 + seed)
            ).resolved.mean()
        )
    assert np.mean(resolved) > 0.85


def test_a_bin_without_any_gradient_needs_more_than_can_be_said(map_of: Any) -> None:
    s = np.random.default_rng(0).standard_normal((3, 6, 20))
    s[1] = 0
    map = map_of(s)
    assert sample_size(map, similarity(map)) == MOST_GROUPS
    assert "would do" not in summarize(Reading(map), 2).lines()[0]
