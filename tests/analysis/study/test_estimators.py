"""The study's problem: its truth, the predicted bias of the plug-in, intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from demerge.analysis.measurement.options import DRAWS
from demerge.analysis.similarity import halves, similarity
from demerge.analysis.study.estimators import (
    PLUG_IN,
    UNBIASED,
    compare_by_samples,
    measure_disagreement,
    measure_errors,
    take_groups,
)
from demerge.analysis.study.known import KnownProblem
from demerge.analysis.study.plots import draw_neighbours
from demerge.errors import UsageError
from demerge.reporting.theme import render

EVEN = KnownProblem(strengths=(1.0, 1.5, 1.0, 0.8))


def test_the_means_have_the_similarity_they_say() -> None:
    mu, truth = KnownProblem().means, KnownProblem().cosine
    norms = np.linalg.norm(mu, axis=1)
    assert norms == pytest.approx(KnownProblem().strengths)
    assert mu @ mu.T / np.outer(norms, norms) == pytest.approx(truth)
    assert np.diagonal(truth, 1) == pytest.approx(0.56) and truth[0, 3] == pytest.approx(0.56**3)


def test_without_noise_all_agree() -> None:
    found = similarity(KnownProblem(noise=0).measure())
    assert found.resolved.all()
    for cosine in (found.naive, found.cosine, KnownProblem(noise=0).predict_plug_in(64)):
        assert cosine == pytest.approx(KnownProblem().cosine)


@pytest.mark.parametrize("draws", DRAWS)
def test_the_plug_in_is_biased_as_predicted(draws: str) -> None:
    naive = np.array(
        [similarity(EVEN.measure(draws=draws, seed=seed)).naive for seed in range(200)]
    )
    assert naive.mean(0) == pytest.approx(EVEN.predict_plug_in(64, draws), abs=0.02)
    beside = EVEN.predict_plug_in(64, draws)[0, 1]
    assert beside > 0.7 if draws == "shared" else beside < 0.4


def test_the_table_shows_who_lies() -> None:
    table = measure_errors(EVEN, maps=100).set_index(["draws", "estimator"])
    assert len(table) == 4 and table.loc[("shared", PLUG_IN), "bias"] > 0.2
    assert table.loc[("independent", PLUG_IN), "bias"] < -0.1
    for kind in DRAWS:
        plug_in, ours = table.loc[(kind, PLUG_IN)], table.loc[(kind, UNBIASED)]
        assert abs(ours.bias) < 0.03 and abs(ours.neighbours) < 0.03
        assert ours.covered >= 0.9 > plug_in.covered
        assert plug_in.unresolved == 0 and ours.rmse < plug_in.rmse


def test_weak_bins_are_said_to_be_unresolved() -> None:
    table = measure_errors(
        KnownProblem(strengths=(1.0, 1.0, 0.05, 0.05)), ["shared"], maps=20
    ).set_index("estimator")
    assert table.unresolved[PLUG_IN] == 0 and 0.4 < table.unresolved[UNBIASED] <= 0.6
    none = (
        measure_errors(KnownProblem(strengths=(0.01, 0.01)), ["shared"], maps=3)
        .set_index("estimator")
        .loc[UNBIASED]
    )
    assert none.unresolved > 0.9


def test_samples_bring_the_plug_in_to_the_truth_and_figures_show_it() -> None:
    maps = {kind: EVEN.measure(groups=40, batch_size=16, draws=kind) for kind in DRAWS}
    table = compare_by_samples(maps, [5, 10, 40, 80])
    assert table.samples.unique().tolist() == [80, 160, 640] and len(table) == 12
    at = table.set_index(["draws", "estimator", "samples"]).cosine
    for kind in DRAWS:
        assert abs(at[kind, PLUG_IN, 640] - 0.56) < abs(at[kind, PLUG_IN, 80] - 0.56)
        assert at[kind, UNBIASED, 640] == pytest.approx(0.56, abs=0.06)
    figure = draw_neighbours(table, 0.56)
    assert (
        isinstance(figure, Figure) and len(figure.axes) == 2 and len(render(figure, "png")) > 5000
    )
    assert render(draw_neighbours(table)) == render(draw_neighbours(table))


def test_two_kinds_of_draws_agree_for_the_unbiased_estimator_alone() -> None:
    known = KnownProblem(strengths=(1.0, 1.0, 0.2, 0.1, 0.1), dimensions=400)
    tables = [
        measure_disagreement(
            *(known.measure(groups=12, draws=kind, seed=seed) for kind in DRAWS)
        ).set_index("estimator")
        for seed in range(40)
    ]
    z = {name: np.array([table.z[name] for table in tables]) for name in (PLUG_IN, UNBIASED)}
    assert z[PLUG_IN].mean() > 4 and abs(z[UNBIASED].mean()) < 0.6 and z[UNBIASED].std() < 1.5
    bias = np.mean([table.loc[PLUG_IN, "first"] - table.loc[UNBIASED, "first"] for table in tables])
    assert bias == pytest.approx(56 / 96, rel=0.1)
    with pytest.raises(UsageError, match="same bins"):
        measure_disagreement(known.measure(), EVEN.measure())


def test_first_groups_are_a_measurement_of_their_own() -> None:
    whole = EVEN.measure(groups=12)
    part = take_groups(whole, 6)
    assert part.M == 6 and np.array_equal(part.gram, whole.gram[:, :6, :, :6])


def test_maps_of_a_known_problem_repeat() -> None:
    assert np.array_equal(EVEN.measure(seed=3).gram, EVEN.measure(seed=3).gram)
    assert not np.array_equal(EVEN.measure(seed=3).gram, EVEN.measure(seed=4).gram)


def test_many_groups_are_halved_without_listing_all_ways() -> None:
    A, B = halves(range(64), 64, seed=0)
    assert A.shape == B.shape == (20, 64) and (A + B == 1).all() and (A.sum(1) == 32).all()


@pytest.mark.parametrize(
    "wrong", [{"neighbours": 1.0}, {"noise": -1.0}, {"strengths": ()}, {"dimensions": 3}]
)
def test_what_is_no_problem_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        KnownProblem(**wrong)


def test_what_cannot_be_measured_is_refused() -> None:
    for wrong in ({"groups": 4}, {"batch_size": 0}, {"draws": "some"}):
        with pytest.raises(UsageError):
            EVEN.measure(**wrong)
    with pytest.raises(UsageError):
        EVEN.predict_plug_in(8, "some")
    with pytest.raises(UsageError, match="spread"):
        measure_errors(EVEN, maps=1)
