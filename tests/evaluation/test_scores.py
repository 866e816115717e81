from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from demerge.errors import ComparisonError, InputError, UsageError
from demerge.evaluation.scores import Scores, rank, rows_of, tables_of

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


def test_precision_is_part_of_the_name_and_was_no_before_it_was_recorded(
    make_scores: Make, tmp_path: Path
) -> None:
    scores = make_scores("ties", "merge", [7.1])[0]
    assert "bf16" not in str(scores.protocol)
    assert "steps, bf16" in str(replace(scores.protocol, mixed_precision="bf16"))
    document = scores.document()
    assert document["protocol"].pop("mixed_precision") == "no"
    (tmp_path / "old.json").write_text(json.dumps(document))
    assert Scores.load(tmp_path / "old.json") == scores


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
        ("mixed_precision", "bf16"),
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
