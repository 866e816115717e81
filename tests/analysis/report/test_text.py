"""What an analysis says: gradient where it wins on held-out groups, uniform where it does not, and never more than is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demerge.analysis import SCORES, cut, lines, summary, write
from demerge.analysis.partitioning.bootstrap import Evidence, curve, support
from demerge.analysis.report.text import row_sums, taken
from demerge.conflict import ConflictMap
from demerge.timesteps import Partition


@pytest.mark.parametrize("score", SCORES)
def test_uneven_planted_cuts_beat_uniform_on_held_out_groups(planted: Any, score: str) -> None:
    map = planted([0, 2, 4, 6, 16])
    said = summary(map, 4, score=score)
    assert said["advice"] == said["taken"] == "gradient", said
    assert said["held_out"]["uniform"]["value"] > 2 * said["held_out"]["uniform"]["se"]
    shares = {name: each["share"] for name, each in said["cuts"].items()}
    assert shares["gradient"] > shares["uniform"] and shares["gradient"] > shares["logsnr"]
    assert [row["support"] for row in said["support"]] == [1.0] * 3
    assert json.dumps(said, allow_nan=False)


def test_a_cut_of_ones_own_is_judged_and_taken(planted: Any) -> None:
    map = planted([0, 2, 4, 6, 16])
    good, poor = (Partition.from_cuts(1000, cuts) for cuts in ([125, 250, 375], [30, 800, 900]))
    for given, advice in ((good, "given"), (poor, "uniform")):
        said = summary(map, 9, given=given, minimum=1)
        assert (said["ranges"], said["judged"], said["taken"], said["advice"]) == (
            4,
            "given",
            "given",
            advice,
        ), said["reason"]
        assert said["cuts"]["given"]["cuts"] == given.cuts and taken(map, said) == given
        assert [row["support"] == 1 for row in said["support"]] == [advice == "given"] * 3
        assert [(row["low"], row["high"]) for row in said["support"]] == [
            (None, None)
        ] * 3  # they do not vary
        assert (
            sum(
                "the gradient's own 4 ranges have a cut within a bin in" in line
                for line in lines(said)
            )
            == 3
        )
    assert said["held_out"]["uniform"]["value"] < 0


def test_hierarchical_cuts_are_judged_where_they_are_asked_for(planted: Any) -> None:
    said = summary(planted([0, 2, 4, 6, 16]), 4, method="hierarchical")
    assert (said["judged"], said["advice"], said["taken"]) == (
        "hierarchical",
        "hierarchical",
        "hierarchical",
    )
    assert said["cuts"]["hierarchical"]["cuts"] == [125, 250, 375] and len(said["support"]) == 3


@pytest.mark.parametrize(
    ("edges", "advice"), [([0, 2, 4, 6, 16], "gradient"), ([0, 4, 8, 12, 16], "uniform")]
)
def test_advised_takes_the_advice(planted: Any, edges: list[int], advice: str) -> None:
    said = summary(planted(edges, noise=0.15), 4, method="advised")
    assert said["judged"] == "gradient" and said["advice"] == said["taken"] == advice


def test_the_least_width_is_kept_by_all_that_is_said(planted: Any) -> None:
    said = summary(planted([0, 1, 2, 16]), 3, minimum=4)
    assert np.diff([0, *said["cuts"]["gradient"]["cuts"], 1000]).min() >= 250
    assert min(row["low"] for row in said["support"]) >= 250


def test_planted_uniform_cuts_are_advised_as_uniform(planted: Any) -> None:
    said = summary(planted([0, 4, 8, 12, 16], noise=0.15), 4)
    assert said["cuts"]["gradient"]["cuts"] == said["cuts"]["uniform"]["cuts"] == [250, 500, 750]
    assert said["advice"] == "uniform" and "less than 2 SE" in said["reason"]


def test_a_cut_without_a_choice_is_not_advised(planted: Any) -> None:
    said = summary(planted([0, 1, 2, 3, 4]), 4)
    assert (
        said["cuts"]["gradient"]["share"] == 1
        and said["advice"] == "uniform"
        and "nothing to choose" in said["reason"]
    )


def test_noise_is_called_noise(map_of: Any) -> None:
    said = summary(map_of(np.random.default_rng(0).standard_normal((8, 6, 200))), 4)
    assert (said["advice"], said["taken"], said["cuts"]["gradient"]) == ("uniform", "uniform", None)
    assert said["unresolved"] == [[125 * i, 125 * i + 125] for i in range(8)]
    assert said["cuts"]["uniform"]["share"] is None
    assert any("uniform" in line for line in lines(said)) and json.dumps(said, allow_nan=False)


def test_bins_that_may_be_resolved_by_luck_are_named(map_of: Any) -> None:
    s = np.zeros((4, 8, 60))
    s[np.arange(4), :, np.arange(4)] = [[5], [1.1], [5], [5]]
    said = summary(map_of(s + 0.5 * np.random.default_rng(0).standard_normal((4, 8, 60))), 2)
    assert (said["unresolved"], said["weak"]) == ([], [[250, 500]])
    assert any("0 bins unresolved, 1 perhaps resolved by luck" in line for line in lines(said))


def test_a_summary_says_what_it_promises_and_how_many_groups_would_do(planted: Any) -> None:
    clear, dim = (
        summary(planted([0, 2, 4, 6, 16]), 4),
        summary(planted([0, 2, 4, 6, 16], noise=1.2), 4),
    )
    assert clear["benefit"]["promised"] and clear["groups_needed"] == clear["groups"] == 8
    assert [row["range"] for row in clear["benefit"]["ranges"]] == [
        [0, 125],
        [125, 250],
        [250, 375],
        [375, 1000],
    ]
    assert any(line.startswith("benefit       a joint AdamW step misses") for line in lines(clear))
    assert dim["unresolved"] and dim["groups_needed"] > 8
    assert any(f"({dim['groups_needed']} groups or more would do)" in line for line in lines(dim))
    assert "taken         the gradient cut into 4 ranges" in lines(clear) and lines(clear)[
        0
    ].startswith("verdict ")


def test_one_direction_leaves_nothing_to_gain(map_of: Any) -> None:
    s = np.eye(1, 20)[:, None] + 0.2 * np.random.default_rng(0).standard_normal((1, 8, 20)).repeat(
        8, 0
    )
    assert summary(map_of(s), 4)["advice"] == "uniform"


def test_row_sums_tell_a_converged_base(map_of: Any) -> None:
    rng = np.random.default_rng(0)
    mu = rng.standard_normal((8, 30))
    noise = 0.1 * rng.standard_normal((8, 6, 30))
    converged, rising = (
        row_sums(map_of((mu - mu.mean(0))[:, None] + noise)),
        row_sums(map_of(mu[:1, None] + noise)),
    )
    assert abs(converged["ratio"]) < 0.01 and converged["rows"] <= 2
    assert rising["ratio"] > 0.95 and rising["rows"] == 8


def test_support_counts_draws_near_a_cut(planted: Any) -> None:
    map = planted([0, 3, 8])
    partition = cut(map, 2, minimum=1)
    draws = np.array([[375.0]] * 8 + [[500.0]] + [[875.0]])
    assert support(map, partition, draws) == [(375, 0.9, 375, 875)]


def test_support_of_a_cut_within_a_bin(planted: Any) -> None:
    map = planted([0, 3, 8])
    assert support(
        map, Partition.from_cuts(1000, [300]), np.array([[250.0], [375.0], [500.0]])
    ) == [(300, 2 / 3, 250, 500)]


def test_the_curve_reaches_one_where_all_blocks_are_apart(planted: Any) -> None:
    shares = curve(Evidence.of(planted([0, 1, 3, 4, 8])), range(1, 9))
    last = shares[shares.ranges == 8].set_index("method").share
    assert last["gradient"] == pytest.approx(1) and last["uniform"] == pytest.approx(1)
    gradient = shares[shares.method == "gradient"].share
    assert gradient.iloc[0] == 0 and (gradient.diff().dropna() > -0.01).all()
    assert gradient.iloc[3] > shares[shares.method == "uniform"].share.iloc[3]


@pytest.mark.parametrize("noise", [0.1, 30.0])
def test_write_leaves_every_file_and_reads_back(planted: Any, tmp_path: Path, noise: float) -> None:
    map = planted([0, 1, 2, 3, 4], noise=noise)
    said = summary(map, 4)
    written = write(map, tmp_path / "out", said, model="my base", data="digits")
    assert {path.name for path in written} == {path.name for path in (tmp_path / "out").iterdir()}
    assert (
        len(written) == 3 + 3 * (5 if noise < 1 else 2) + 1
    )  # each plot for light and for dark pages and as png, no empty one
    assert np.array_equal(
        ConflictMap.load(tmp_path / "out" / "conflict.safetensors").gram, map.gram
    )
    assert Partition.load(tmp_path / "out" / "partition.json").cuts == [250, 500, 750]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(
        json.dumps(said)
    )
    assert "demerge finetune &#x27;my base&#x27; --data digits" in written[-1].read_text(
        encoding="utf-8"
    )
    for path in written[3:-1]:
        assert path.read_bytes()[:5] == (b"<?xml" if path.suffix == ".svg" else b"\x89PNG\r")


def test_a_map_that_is_stored_is_left_alone(planted: Any, tmp_path: Path) -> None:
    map = planted([0, 1, 2, 3, 4])
    kept = (
        replace(map, origin=replace(map.origin, data="extended"))
        .save(tmp_path / "conflict.safetensors")
        .read_bytes()
    )
    written = write(map, tmp_path, summary(map, 4), stored=True)
    assert written[0].read_bytes() == kept
    assert write(map, tmp_path, summary(map, 4))[0].read_bytes() != kept


def test_one_is_said_in_the_singular(map_of: Any) -> None:
    text = "\n".join(
        lines(summary(map_of(np.random.default_rng(0).standard_normal((8, 6, 200))), 1))
    )
    assert "into 1 range\n" in text and "for 1 range:" in text and "8 bins unresolved" in text
