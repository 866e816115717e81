"""What an analysis says: gradient where it wins on held-out groups, uniform where it does not, and never more than is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demerge.analysis import SCORES, Reading, partition, summarize, write_report
from demerge.analysis import similarity as statistics
from demerge.analysis.partitioning.bootstrap import CutSupport, support
from demerge.analysis.report.next_steps import CommandNames
from demerge.analysis.report.summary import ConflictSummary, row_sums
from demerge.conflict import ConflictMap
from demerge.reporting.theme import LIGHT, Pictures
from demerge.timesteps import Partition


def summary(
    map: ConflictMap,
    n: int,
    method: str = "gradient",
    score: str = "step",
    minimum: int | None = None,
    **options: Any,
) -> ConflictSummary:
    return summarize(Reading(map, score, minimum), n, method, **options)


@pytest.mark.parametrize("score", SCORES)
def test_uneven_planted_cuts_beat_uniform_on_held_out_groups(planted: Any, score: str) -> None:
    map = planted([0, 2, 4, 6, 16])
    said = summary(map, 4, score=score)
    assert said.advice == said.taken == "gradient", said
    assert said.held_out["uniform"].above(2)
    document = said.document()
    shares = {name: each["share"] for name, each in document["cuts"].items()}
    assert shares["gradient"] > shares["uniform"] and shares["gradient"] > shares["logsnr"]
    assert [each.support for each in said.support] == [1.0] * 3
    assert json.dumps(document, allow_nan=False)


def test_a_cut_of_ones_own_is_judged_and_taken(planted: Any) -> None:
    map = planted([0, 2, 4, 6, 16])
    good, poor = (Partition.from_cuts(1000, cuts) for cuts in ([125, 250, 375], [30, 800, 900]))
    for given, advice in ((good, "given"), (poor, "uniform")):
        said = summary(map, 9, given=given, minimum=1)
        assert (said.ranges, said.judged, said.taken) == (4, "given", "given")
        assert said.advice == advice, said.reason
        assert said.partition == given
        assert [each.support == 1 for each in said.support] == [advice == "given"] * 3
        assert {(each.low, each.high) for each in said.support} == {(None, None)}, (
            "they do not vary"
        )
        own = "the gradient's own 4 ranges have a cut within a bin in"
        assert sum(own in line for line in said.lines()) == 3
    assert said.held_out["uniform"].value < 0


def test_hierarchical_cuts_are_judged_where_they_are_asked_for(planted: Any) -> None:
    said = summary(planted([0, 2, 4, 6, 16]), 4, method="hierarchical")
    assert (said.judged, said.advice, said.taken) == (
        "hierarchical",
        "hierarchical",
        "hierarchical",
    )
    assert said.partition.cuts == [125, 250, 375] and len(said.support) == 3


@pytest.mark.parametrize(
    ("edges", "advice"), [([0, 2, 4, 6, 16], "gradient"), ([0, 4, 8, 12, 16], "uniform")]
)
def test_advised_takes_the_advice(planted: Any, edges: list[int], advice: str) -> None:
    said = summary(planted(edges, noise=0.15), 4, method="advised")
    assert said.judged == "gradient" and said.advice == said.taken == advice


def test_the_least_width_is_kept_by_all_that_is_said(planted: Any) -> None:
    said = summary(planted([0, 1, 2, 16]), 3, minimum=4)
    assert min(len(span) for span in said.partition) >= 250
    assert min(each.low or 0 for each in said.support) >= 250


def test_planted_uniform_cuts_are_advised_as_uniform(planted: Any) -> None:
    said = summary(planted([0, 4, 8, 12, 16], noise=0.15), 4)
    cuts = said.document()["cuts"]
    assert cuts["gradient"]["cuts"] == cuts["uniform"]["cuts"] == [250, 500, 750]
    assert said.advice == "uniform" and "less than 2 SE" in said.reason


def test_a_cut_without_a_choice_is_not_advised(planted: Any) -> None:
    said = summary(planted([0, 1, 2, 3, 4]), 4)
    assert said.explained.share is not None and said.explained.share.value == 1
    assert said.advice == "uniform" and "nothing to choose" in said.reason


def test_noise_is_called_noise(map_of: Any) -> None:
    said = summary(map_of(np.random.default_rng(0).standard_normal((8, 6, 200))), 4)
    assert (said.advice, said.taken, said.cuts["gradient"]) == ("uniform", "uniform", None)
    document = said.document()
    assert document["unresolved"] == [[125 * i, 125 * i + 125] for i in range(8)]
    assert document["cuts"]["uniform"]["share"] is None
    assert any("uniform" in line for line in said.lines())
    assert json.dumps(document, allow_nan=False)


def test_bins_that_may_be_resolved_by_luck_are_named(map_of: Any) -> None:
    s = np.zeros((4, 8, 60))
    s[np.arange(4), :, np.arange(4)] = [[5], [1.1], [5], [5]]
    said = summary(map_of(s + 0.5 * np.random.default_rng(0).standard_normal((4, 8, 60))), 2)
    assert (said.unresolved, said.document()["weak"]) == ([], [[250, 500]])
    assert any("0 bins unresolved, 1 perhaps resolved by luck" in line for line in said.lines())


def test_a_summary_says_what_it_promises_and_how_many_groups_would_do(planted: Any) -> None:
    clear, dim = (
        summary(planted([0, 2, 4, 6, 16]), 4),
        summary(planted([0, 2, 4, 6, 16], noise=1.2), 4),
    )
    assert clear.expected_gain.is_promised and clear.groups_needed == 8
    assert [row["range"] for row in clear.document()["benefit"]["ranges"]] == [
        [0, 125],
        [125, 250],
        [250, 375],
        [375, 1000],
    ]
    text, hidden = clear.lines(), dim.lines()
    assert any(line.startswith("benefit       a joint AdamW step misses") for line in text)
    assert dim.unresolved and dim.groups_needed > 8
    assert any(f"({dim.groups_needed} groups or more would do)" in line for line in hidden)
    assert "taken         the gradient cut into 4 ranges" in text and text[0].startswith("verdict ")


def test_one_direction_leaves_nothing_to_gain(map_of: Any) -> None:
    s = np.eye(1, 20)[:, None] + 0.2 * np.random.default_rng(0).standard_normal((1, 8, 20)).repeat(
        8, 0
    )
    assert summary(map_of(s), 4).advice == "uniform"


def test_row_sums_tell_a_converged_base(map_of: Any) -> None:
    rng = np.random.default_rng(0)
    mu = rng.standard_normal((8, 30))
    noise = 0.1 * rng.standard_normal((8, 6, 30))
    converged, rising = (
        row_sums(Reading(map_of((mu - mu.mean(0))[:, None] + noise))),
        row_sums(Reading(map_of(mu[:1, None] + noise))),
    )
    assert abs(converged.ratio.value) < 0.01 and converged.rows <= 2
    assert rising.ratio.value > 0.95 and rising.rows == 8


def test_support_counts_draws_near_a_cut(planted: Any) -> None:
    map = planted([0, 3, 8])
    found = partition(map, 2, minimum=1)
    draws = np.array([[375.0]] * 8 + [[500.0]] + [[875.0]])
    assert support(map, found, draws) == [CutSupport(375, 0.9, 375, 875)]


def test_support_of_a_cut_within_a_bin(planted: Any) -> None:
    map = planted([0, 3, 8])
    assert support(
        map, Partition.from_cuts(1000, [300]), np.array([[250.0], [375.0], [500.0]])
    ) == [CutSupport(300, 2 / 3, 250, 500)]


def test_the_share_reaches_one_if_all_blocks_are_apart(planted: Any) -> None:
    reading = Reading(planted([0, 1, 3, 4, 8]))
    shares = {
        method: [reading.explained_share(reading.partition(n, method)).value for n in range(1, 9)]
        for method in ("gradient", "uniform")
    }
    assert shares["gradient"][7] == pytest.approx(1) and shares["uniform"][7] == pytest.approx(1)
    assert shares["gradient"][0] == 0 and (np.diff(shares["gradient"]) > -0.01).all()
    assert shares["gradient"][3] > shares["uniform"][3]


@pytest.mark.parametrize("noise", [0.1, 30.0])
def test_write_leaves_every_file_and_reads_back(planted: Any, tmp_path: Path, noise: float) -> None:
    map = planted([0, 1, 2, 3, 4], noise=noise)
    said = summary(map, 4)
    written = write_report(said, tmp_path / "out", CommandNames("my base", "digits"))
    assert {path.name for path in written} == {path.name for path in (tmp_path / "out").iterdir()}
    assert (
        len(written) == 3 + 3 * (5 if noise < 1 else 2) + 1
    )  # each plot for light and for dark pages and as png, no empty one
    assert np.array_equal(
        ConflictMap.load(tmp_path / "out" / "conflict.safetensors").gram, map.gram
    )
    assert Partition.load(tmp_path / "out" / "partition.json").cuts == [250, 500, 750]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(
        json.dumps(said.document())
    )
    assert "demerge finetune &#x27;my base&#x27; --data digits" in written[-1].read_text(
        encoding="utf-8"
    )
    for path in written[3:-1]:
        assert path.read_bytes()[:5] == (b"<?xml" if path.suffix == ".svg" else b"\x89PNG\r")


def test_a_map_that_is_stored_is_left_alone(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {"heatmap": Pictures(b"<svg/>", b"<svg/>", b"")}
    monkeypatch.setattr("demerge.analysis.report.page.draw_plots", lambda summary: drawn)
    map = planted([0, 1, 2, 3, 4])
    kept = (
        replace(map, origin=replace(map.origin, data="extended"))
        .save(tmp_path / "conflict.safetensors")
        .read_bytes()
    )
    written = write_report(summary(map, 4), tmp_path, is_stored=True)
    assert written[0].read_bytes() == kept
    assert write_report(summary(map, 4), tmp_path)[0].read_bytes() != kept


def test_one_is_said_in_the_singular(map_of: Any) -> None:
    noise = map_of(np.random.default_rng(0).standard_normal((8, 6, 200)))
    text = "\n".join(summary(noise, 1).lines())
    assert "into 1 range\n" in text and "for 1 range:" in text and "8 bins unresolved" in text


def test_a_map_is_read_once(planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter of the statistics that everything else is made of."""
    calls = {"similarity": 0, "without_pair": 0}
    for name in calls:
        function = getattr(statistics, name)

        def counted(map: ConflictMap, name: str = name, function: Any = function) -> Any:
            calls[name] += 1
            return function(map)

        monkeypatch.setattr(statistics, name, counted)

    def drawn(draw: Any) -> Pictures:
        draw(LIGHT)  # and not rendered, which takes long and reads nothing
        return Pictures(b"<svg/>", b"<svg/>", b"")

    monkeypatch.setattr("demerge.analysis.report.page.pictures", drawn)
    said = summarize(Reading(planted([0, 1, 2, 3, 4])), None, "advised", with_counts=True)
    write_report(said, tmp_path / "out")
    assert said.lines() and said.document()
    assert calls == {"similarity": 1, "without_pair": 2}  # similarity needs it too


def test_the_numbers_are_those_of_the_first_release(planted: Any) -> None:
    """Golden numbers: a change of these is a change of results."""
    said = summarize(Reading(planted([0, 2, 4, 6, 16])), None, "advised", with_counts=True)
    document = said.document()
    golden = {
        "conflict": {"value": 0.340709, "se": 0.00734257},
        "held_out": {
            "uniform": {"value": 0.404758, "se": 0.0115377},
            "logsnr": {"value": 0.404758, "se": 0.0115377},
        },
        "row_sums": {"ratio": 0.432522, "se": 0.00967533, "rows": 16},
    }
    for name, numbers in golden.items():
        for key, expected in numbers.items():
            assert document[name][key] == pytest.approx(expected, rel=2e-6, abs=1e-12)
    for name, expected in {
        "gain": {"value": 0.341581, "se": 0.00805434, "low": 0.322536, "high": 0.360627},
        "share": {"value": 0.343361, "se": 0.00853683, "low": 0.323174, "high": 0.363547},
        "batch": {
            "size": 64,
            "value": 0.351495,
            "se": 0.00765153,
            "low": 0.333388,
            "high": 0.369603,
        },
    }.items():
        assert document["benefit"][name] == pytest.approx(expected, rel=2e-6, abs=1e-12)
    shares = document["cuts"]
    assert (shares["gradient"]["cuts"], shares["gradient"]["share"]) == ([125, 250, 375], 0.999248)
    assert (shares["logsnr"]["cuts"], shares["logsnr"]["share"]) == ([250, 500, 750], 0.59329)
