"""The verdict says first what was found and what to do; caveats say what to be wary of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from demerge.evaluation.report.verdict import Findings
from demerge.evaluation.scores import Row, Scores, Table, rank, rows_of

Make = Callable[..., list[Scores]]
STEPS = (0.0, 0.05, -0.05)


def findings(rows: Sequence[Row], floors: Sequence[Row] = ()) -> Findings:
    return Findings.of(Table(rank(rows), list(floors)))


def caveats(rows: Sequence[Row], floors: Sequence[Row] = ()) -> str:
    return " ".join(findings(rows, floors).caveats)


def test_a_distance_on_random_features_is_called_that(make_scores: Make) -> None:
    rows = rows_of(make_scores("ties", "merge", [6.0], features="random", distance="FD[random]"))
    assert rows[0].protocol.title == "distance on random features"
    text = " ".join([str(rows[0].protocol), caveats(rows), findings(rows).verdict])
    assert "FD[" not in text
    assert "nor any established metric" in text


@pytest.mark.parametrize(
    ("merge", "joint", "outcome", "opening", "words"),
    [
        (6.0, 7.0, "better", "Merging helped: ties beats", ("beats the base", "beats the joint")),
        (7.5, 7.0, "worse", "Merging did not help", ("beats the base", "is worse than the joint")),
        (7.0, 7.0, "inconclusive", "It is not shown", ("beats the base", "cannot be told apart")),
        (9.0, 7.0, "worse", "Merging did not help", ("is worse than the base",)),
    ],
)
def test_the_verdict_is_honest(
    make_scores: Make,
    merge: float,
    joint: float,
    outcome: str,
    opening: str,
    words: tuple[str, ...],
) -> None:
    levels = {("ties", "merge"): merge, ("dare", "merge"): merge + 1}
    levels |= {("base", "base"): 8.0, ("joint", "joint"): joint}
    scores: list[Scores] = []
    for (name, kind), level in levels.items():
        scores += make_scores(name, kind, [level + step for step in STEPS])
    result = findings(rows_of(scores))
    assert result.outcome == outcome
    assert result.verdict.startswith(opening)
    for word in (*words, "best merge, ties", "chosen among 2 merges", "flatters"):
        assert word in result.verdict


def test_missing_controls_leave_no_verdict(make_scores: Make) -> None:
    base = make_scores("base", "base", [8.0, 8.1, 8.2])
    result = findings(rows_of(make_scores("ties", "merge", [6.0, 6.1, 6.2]) + base))
    assert result.outcome == "none"
    assert result.verdict.startswith("No verdict on merging: the joint control was not evaluated.")
    assert "demerge finetune --ranges joint" in result.verdict
    assert findings(rows_of(base)).verdict.startswith("There is nothing to say about merging")


@pytest.mark.parametrize(
    ("seeds", "num_images", "advice"), [(2, 2000, "--seeds 0,1,2"), (3, 60, "--num-images")]
)
def test_a_table_that_tests_nothing_says_what_to_do(
    make_scores: Make, seeds: int, num_images: int, advice: str
) -> None:
    scores: list[Scores] = []
    for kind in ("merge", "base", "joint"):
        scores += make_scores(kind, kind, [8.0, 7.0, 7.5][:seeds], num_images=num_images)
    result = findings(rows_of(scores))
    assert result.outcome == "none"
    assert result.verdict.startswith("No verdict on merging: ") and advice in result.verdict


def test_training_seeds_are_the_checkpoints_under_a_name(make_scores: Make) -> None:
    base = rows_of(make_scores("base", "base", [8.0, 8.1, 8.2]))[0]
    merge = rows_of(make_scores("ties", "merge", [6.0, 6.1, 6.2]))[0]
    assert "Training seeds: 1." in caveats([merge, base])
    trained = tuple(replace(score, model_sha256=f"{score.seed}") for score in merge.scores)
    text = caveats([replace(merge, scores=trained), base])
    assert "Training seeds: each name has 3 checkpoints" in text
    assert "5.8 %" not in text


def test_caveats(make_scores: Make) -> None:
    few = caveats(rows_of(make_scores("ties", "merge", [6.0], num_images=60)))
    for word in ("Rank-deficient", "not FID", "only 1 sampling seed", "No noise floor", "5.8 %"):
        assert word in few
    assert "No base model" in few and "No joint control" in few
    rows = rows_of(make_scores("base", "base", [1.0, 1.1, 1.2]))
    floors = rows_of(make_scores("digits train", "real", [2.0]))
    assert "below the noise floor" in caveats(rows, floors)
    smaller = rows_of(make_scores("digits train", "real", [2.0], num_images=100))
    assert "below the noise floor" not in caveats(rows, smaller)
    assert "only 100 real images" in caveats(rows, smaller)
