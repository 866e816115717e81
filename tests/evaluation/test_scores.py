from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from demerge.errors import ComparisonError, InputError, UsageError
from demerge.evaluation.report.verdict import outcome, verdict, warnings
from demerge.evaluation.scores import Protocol, Scores, ensure_alike, rank, rows_of, tables_of

Make = Callable[..., list[Scores]]


def test_json_round_trip(make_scores: Make, tmp_path: Path) -> None:
    scores = make_scores("ties", "merge", [7.1])[0]
    scores.save(tmp_path / "ties.json")
    assert Scores.load(tmp_path / "ties.json") == scores


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("protocol"),
        lambda d: d.update(format="other/1"),
        lambda d: d.update(kind="king"),
        lambda d: d.update(metrics={"fd": "x"}),
        lambda d: d.update(metrics=3),
        lambda d: d["protocol"].update(num_images=1),
        lambda d: d["protocol"].update(bogus=1),
        lambda d: d.update(losses={"ranges": ["a"], "blocks": []}),
    ],
)
def test_damaged_scores_are_refused(
    make_scores: Make, tmp_path: Path, damage: Callable[[dict[str, object]], object]
) -> None:
    document = json.loads(json.dumps(make_scores("ties", "merge", [7.1])[0].document()))
    damage(document)
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"bad\.json"):
        Scores.load(tmp_path / "bad.json")


def test_guidance_is_part_of_the_name(make_scores: Make) -> None:
    protocol = make_scores("ties", "merge", [7.1])[0].protocol
    assert "guidance" not in str(protocol)
    assert "steps, guidance 7.5" in str(replace(protocol, guidance_scale=7.5))


def test_text_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[1, 2")
    with pytest.raises(InputError, match=r"bad\.json"):
        Scores.load(tmp_path / "bad.json")


def test_infinite_metrics_are_refused(make_scores: Make) -> None:
    with pytest.raises(UsageError, match="fd"):
        replace(make_scores("x", "merge", [1.0])[0], metrics={"fd": math.inf})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preprocess", "clean"),
        ("num_images", 5000),
        ("steps", 100),
        ("reference_sha256", "00"),
        ("sampler", "base"),
        ("guidance_scale", 7.5),
    ],
)
def test_unlike_protocols_are_not_ranked(make_scores: Make, name: str, value: object) -> None:
    scores = make_scores("a", "base", [8.0]) + make_scores("b", "merge", [7.0], **{name: value})
    with pytest.raises(ComparisonError, match=name) as caught:
        rank(rows_of(scores))
    assert caught.value.exit_code == 6
    assert str(value) in str(caught.value)


def test_ranking_and_rows(make_scores: Make) -> None:
    rows = rows_of(make_scores("a", "base", [8.0, 8.2]) + make_scores("b", "merge", [7.0, 7.4]))
    assert [row.model for row in rank(rows)] == ["b", "a"]
    assert rows[0].mean("fd") == pytest.approx(8.1)
    assert rows[0].sd("fd") == pytest.approx(0.2 / 2**0.5)
    assert math.isnan(rows[0].mean("drift"))
    with pytest.raises(UsageError, match="two scores"):
        rows_of(make_scores("a", "base", [1.0]) + make_scores("a", "base", [2.0]))
    with pytest.raises(UsageError, match="no scores"):
        ensure_alike([])


def test_the_largest_group_is_ranked_and_floors_follow_their_reference(make_scores: Make) -> None:
    floors = [
        *make_scores("real", "real", [2.0], steps=0),
        *make_scores("other", "real", [1.0], reference_sha256="00"),
    ]
    models = [
        *make_scores("lone", "model", [5.0], num_images=9),
        *make_scores("a", "base", [8.0]),
        *make_scores("b", "merge", [7.0]),
    ]
    first, second = tables_of([*floors, *models])
    assert [row.model for row in first.rows] == ["b", "a"]
    assert [row.model for row in first.floors] == ["real"]
    assert [row.model for row in second.rows] == ["lone"]
    with pytest.raises(UsageError, match="no scores of a model"):
        tables_of(floors)


def test_reprs_are_short(make_scores: Make) -> None:
    score = make_scores("ties", "merge", [7.0])[0]
    assert (
        repr(score)
        == "Scores(ties, merge, seed 0: fd 7, kid 0.7, precision 0.9, recall 0.8, density 1, coverage 0.7)"
    )
    assert repr(rows_of([score])[0]) == "Row(ties, merge, 1 seeds: fd 7)"
    assert len(repr(score.protocol)) < 200
    assert "ab" * 32 not in repr(score.protocol)


def test_a_distance_on_random_features_is_called_that(make_scores: Make) -> None:
    rows = rows_of(make_scores("ties", "merge", [6.0], features="random", distance="FD[random]"))
    protocol: Protocol = rows[0].scores[0].protocol
    assert protocol.title == "distance on random features"
    text = " ".join([str(protocol), *warnings(rows, []), verdict(rows)])
    assert "FD[" not in text
    assert "nor any established metric" in text


@pytest.mark.parametrize(
    ("merge", "base", "joint", "expected", "words"),
    [
        (
            6.0,
            8.0,
            7.0,
            "better",
            ["beats the base", "beats the joint control", "better than both controls"],
        ),
        (
            7.5,
            8.0,
            7.0,
            "worse",
            ["beats the base", "is worse than the joint control", "a control does better"],
        ),
        (
            7.0,
            8.0,
            7.0,
            "inconclusive",
            ["beats the base", "cannot be told apart from the joint", "not shown"],
        ),
        (9.0, 8.0, 7.0, "worse", ["is worse than the base", "a control does better"]),
    ],
)
def test_the_verdict_is_honest(
    make_scores: Make, merge: float, base: float, joint: float, expected: str, words: list[str]
) -> None:
    steps = (0.0, 0.05, -0.05)
    scores = [
        *make_scores("ties", "merge", [merge + d for d in steps]),
        *make_scores("dare", "merge", [merge + 1 + d for d in steps]),
        *make_scores("base", "base", [base + d for d in steps]),
        *make_scores("joint", "joint", [joint + d for d in steps]),
    ]
    rows = rank(rows_of(scores))
    assert outcome(rows) == expected
    for word in [*words, "best merge, ties", "chosen among 2 merges", "flatters"]:
        assert word in verdict(rows)


def test_missing_controls_leave_no_conclusion(make_scores: Make) -> None:
    rows = rows_of(
        make_scores("ties", "merge", [6.0, 6.1, 6.2]) + make_scores("base", "base", [8.0, 8.1, 8.2])
    )
    assert outcome(rows) == "none"
    assert "no conclusion" in verdict(rows)
    assert "Nothing can be said against the joint control" in verdict(rows)
    assert "nothing to say about merging" in verdict(rows_of(make_scores("base", "base", [8.0])))


def test_training_seeds_are_the_checkpoints_under_a_name(make_scores: Make) -> None:
    rows = rows_of(
        make_scores("ties", "merge", [6.0, 6.1, 6.2]) + make_scores("base", "base", [8.0, 8.1, 8.2])
    )
    assert "Training seeds: 1." in " ".join(warnings(rows, []))
    trained = replace(
        rows[0], scores=tuple(replace(s, model_sha256=f"{s.seed}") for s in rows[0].scores)
    )
    text = " ".join(warnings([trained, rows[1]], []))
    assert "Training seeds: 3 checkpoints stand under each name" in text
    assert "5.8 %" not in text


def test_warnings(make_scores: Make) -> None:
    few = rows_of(make_scores("ties", "merge", [6.0], num_images=60))
    text = " ".join(warnings(few, []))
    for word in (
        "Rank-deficient",
        "not FID",
        "sampling seed",
        "No noise floor",
        "No base model",
        "No joint control",
        "5.8 %",
    ):
        assert word in text
    rows = rows_of(make_scores("base", "base", [1.0, 1.1, 1.2]))
    floors = rows_of(make_scores("digits train", "real", [2.0]))
    assert "below the noise floor" in " ".join(warnings(rows, floors))
    smaller = rows_of(make_scores("digits train", "real", [2.0], num_images=100))
    assert "below the noise floor" not in " ".join(warnings(rows, smaller))
    assert "only 100 real images" in " ".join(warnings(rows, smaller))
