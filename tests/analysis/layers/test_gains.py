"""Gains of layers: unbiased, held out, believed where they are planted and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from demerge.analysis.layers.gains import LayerGains, choose_layers, held_out_gains
from demerge.analysis.layers.plots import draw_gains
from demerge.analysis.partitioning.objective import cover
from demerge.analysis.similarity import all_cross_pairs, group_weights_to_pairs, halves, similarity
from demerge.conflict import Array, ConflictMap, Origin
from demerge.errors import InputError, UsageError
from demerge.reporting.theme import render
from demerge.timesteps import Partition

SIZES = (4, 12, 8, 20, 16)
HALVES = Partition.uniform(1000, 2)
Make = Callable[..., ConflictMap]


def map_of(gradients: Array, sizes: Sequence[int] = SIZES) -> ConflictMap:
    """Make a map whose short layers are kept as they are, of gradients [N M D]."""
    origin = Origin("model", "data", gradients.shape[2], "exact", "shared", False, "euclid", 4, 0)
    layout = {f"block.{k}.weight": size for k, size in enumerate(sizes)}
    gram = np.einsum("imd,jnd->imjn", gradients, gradients)
    bins = Partition.uniform(1000, len(gradients))
    return ConflictMap(
        bins, gram, np.linspace(9, -10, 1000), origin, layout, layers=gradients.astype(np.float32)
    )


def drawn(
    means: Array, noise: float, M: int = 8, seed: int = 0, sizes: Sequence[int] = SIZES
) -> ConflictMap:
    """Make a map of mean gradients [N D] and of noise that the bins of a group share in part."""
    rng = np.random.default_rng(seed)
    shared, own = (
        rng.standard_normal((1, M, means.shape[1])),
        rng.standard_normal((len(means), M, means.shape[1])),
    )
    return map_of(means[:, None] + noise * (0.7 * shared + 0.7 * own), sizes)


def planted(strengths: Sequence[float], N: int = 8, sizes: Sequence[int] = SIZES) -> Array:
    """Return mean gradients that turn round in the middle of [0, T), by strength of each layer."""
    return np.where(np.arange(N) < N // 2, 1.0, -1.0)[:, None] * np.repeat(strengths, sizes)


@pytest.mark.parametrize(
    "partition",
    [HALVES, Partition.from_cuts(1000, [250, 500]), Partition.from_cuts(1000, [300, 700])],
)
def test_gains_are_the_formula_and_add_up_to_that_of_the_map(partition: Partition) -> None:
    map = map_of(
        np.random.default_rng(0).standard_normal((8, 5, sum(SIZES)))
        + planted((1, 0, 2, 0, 0))[:, None]
    )
    assert map.layers is not None
    found = LayerGains.of(map, partition)
    gains, c, w = found.gains(all_cross_pairs(5)), cover(map, partition), map.widths
    start = 0
    for size, gain in zip(SIZES, gains, strict=True):
        s = map.layers[..., start : start + size].astype(np.float64)
        slow = []
        for m, n in permutations(range(5), 2):
            means = [
                [(c[r] * w) @ s[:, g] / (c[r] @ w) for r in range(len(partition))] for g in (m, n)
            ]
            apart = sum((c[r] @ w) * (means[0][r] @ means[1][r]) for r in range(len(partition)))
            slow.append(apart - (w @ s[:, m]) @ (w @ s[:, n]))
        assert gain == pytest.approx(np.mean(slow))
        start += size
    K = similarity(map).K
    sums = np.einsum("rn,nk,rk->r", c * w, K, c * w)
    assert gains.sum() == pytest.approx((sums / (c @ w)).sum() - w @ K @ w, rel=1e-4)


def test_gains_are_unbiased_and_their_errors_honest() -> None:
    strengths, many = (1.0, 0.0, 0.5, 0.0, 0.2), []
    truth, covered = np.array(SIZES) * np.square(strengths), []
    for seed in range(40):
        made = choose_layers(drawn(planted(strengths), 2.0, seed=seed), HALVES, share=1)
        rows = sorted(made.layers, key=lambda row: row.name)
        many.append([row.gain for row in rows])
        covered.append(
            [abs(row.gain - t) < 2.365 * row.se for row, t in zip(rows, truth, strict=True)]
        )
    mean, se = np.mean(many, axis=0), np.std(many, axis=0) / 40**0.5
    assert (abs(mean - truth) < 3.3 * se).all()
    assert np.mean(covered) > 0.9


def test_planted_layers_are_found_and_supported() -> None:
    made = choose_layers(drawn(planted((2.0, 0.1, 1.0, 0.0, 0.0)), 0.5), HALVES, share=0.2)
    assert [row.name for row in made.layers][:2] == ["block.0", "block.2"]
    assert made.is_supported and made.train == ("block.0", "block.2") and made.trained == 0.2
    assert made.curve[0.2]["ranked"].value > 0.9 > made.curve[0.2]["random"].value
    document = made.document()
    assert document["curve"][-1]["ranked"] == pytest.approx({"value": 1, "se": 0}, abs=1e-12)
    assert document["model"] == "model" and document["format"] == "demerge.layers/1"
    assert document["ranges"] == [[0, 500], [500, 1000]]
    text = "\n".join(made.lines())
    assert text.startswith("train 2 of 5 layers, 20.0% of 60 parameters")
    assert "block.0" in text and "--metric adam" in text


def test_equal_layers_support_no_ranking() -> None:
    """All layers gain alike per parameter: a ranking of noise is believed in few maps of 100."""
    sizes, believed = (6,) * 20, []
    for seed in range(30):
        map = drawn(planted((0.3,) * 20, sizes=sizes), 1.0, seed=seed, sizes=sizes)
        made = choose_layers(map, HALVES, share=0.2)
        believed.append(made.is_supported)
        assert made.is_supported or (len(made.train) == 20 and made.trained == 1)
    assert np.mean(believed) < 0.1


def test_noise_supports_nothing() -> None:
    maps = [drawn(np.zeros((8, 60)), 1.0, seed=seed) for seed in range(30)]
    assert np.mean([choose_layers(m, HALVES, share=0.3).is_supported for m in maps]) < 0.05
    made = choose_layers(maps[0], HALVES, share=0.3)
    assert not made.curve and set(made.train) == {row.name for row in made.layers}
    assert made.lines()[0].startswith("no ranking is supported: train all layers")


def test_held_out_gains_are_judged_on_the_other_half() -> None:
    found = LayerGains.of(drawn(planted((1.0, 0.2, 0.6, 0.1, 0.0)), 1.0, M=6), HALVES)
    top = bottom = 0.0
    for A, B in zip(*halves(range(6), 6, 0), strict=True):
        rank, judge = found.gains(group_weights_to_pairs(A)), found.gains(group_weights_to_pairs(B))
        used = 0
        for layer in sorted(range(5), key=lambda k: -rank[k] / SIZES[k]):
            if used + SIZES[layer] <= 0.4 * sum(SIZES):
                used, top = used + SIZES[layer], top + judge[layer]
        bottom += judge.sum()
    assert held_out_gains(found, [0.4])["ranked"][0, 0] == pytest.approx(top / bottom)


def test_layers_are_taken_while_they_fit() -> None:
    found = LayerGains.of(drawn(planted((1.0,) * 5), 0.1), HALVES)
    chosen = found.take(np.array([[3, 0, 1, 2, 4], [0, 1, 2, 3, 4]]), [0.3, 0.4, 1.0])
    assert chosen.shape == (2, 3, 5)
    assert [[np.flatnonzero(row).tolist() for row in order] for order in chosen] == [
        [[0, 1], [0, 3], [0, 1, 2, 3, 4]],
        [[0, 1], [0, 1, 2], [0, 1, 2, 3, 4]],
    ]


@pytest.mark.parametrize(
    ("partition", "share", "error", "message"),
    [
        (HALVES, 0.01, UsageError, r"no layer fits into 0\.01 of 60"),
        (Partition.uniform(1000, 1), 0.1, UsageError, "one range decouples nothing"),
        (Partition.from_cuts(1000, [100]), 0.1, UsageError, "0000-0100 holds no whole bin"),
        (Partition.uniform(1000, 7), 0.1, UsageError, "holds no whole bin"),
    ],
)
def test_mistakes_are_named(
    partition: Partition, share: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as refused:
        choose_layers(drawn(planted((1.0,) * 5), 0.1), partition, share=share)
    assert refused.value.fix  # type: ignore[attr-defined]


def test_a_map_without_layers_is_refused() -> None:
    with pytest.raises(InputError, match="no sketches of layers"):
        choose_layers(replace(drawn(planted((1.0,) * 5), 0.1), layers=None), HALVES)


@pytest.mark.parametrize("noise", [0.5, 30.0], ids=["supported", "noise"])
def test_gains_are_drawn(noise: float) -> None:
    made = choose_layers(drawn(planted((2.0, 0.1, 1.0, 0.0, 0.0)), noise), HALVES, share=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_gains(made)
        assert render(figure) == render(draw_gains(made))
        assert len(render(draw_gains(made, 3), "png")) > 5000
    bars, curve = figure.axes
    scale = 100 / made.total.value if made.curve else 1
    widths = [bar.get_width() for bar in bars.patches]
    assert widths == pytest.approx([row.gain * scale for row in made.layers])
    assert len(curve.lines) == (5 if made.curve else 0)
