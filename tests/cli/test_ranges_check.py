"""`demerge ranges check`: a boundary in all conventions, and the draws of each expert."""

from __future__ import annotations

import json
from typing import Any

import pytest


def check(run: Any, *words: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run("ranges", "check", *words, "--json").out)
    return document


@pytest.mark.parametrize(
    ("boundary", "convention"),
    [(0.9, "sigma"), (900, "timestep"), (0.357142857, "index"), (0.642857143, "unshifted")],
)
def test_all_conventions_of_a_boundary(run: Any, boundary: float, convention: str) -> None:
    found = check(run, boundary, "--as", convention, "--shift", 5)
    values = {"timestep": 900, "sigma": 0.9, "index": 0.357143, "unshifted": 0.642857}
    assert found["conventions"] == pytest.approx(values, rel=1e-6)
    assert found["draws"] == pytest.approx({"high_noise": 0.357143, "low_noise": 0.642857})
    assert found["warnings"] == []


def test_wans_other_boundary(run: Any) -> None:
    done = run("ranges", "check", 0.875, "--shift", 5)
    assert done.code == 0 and "index     0.41667" in done.out
    assert "41.7% to high noise, 58.3% to low noise" in done.out
    assert "diffusers' boundary_ratio" in done.out


def test_few_draws_are_a_warning(run: Any) -> None:
    done = run("ranges", "check", 0.9, "--density", "logit-normal")
    assert "warning   the high-noise expert gets 1.4% of the draws" in done.out
    found = check(run, 0.9, "--density", "logit-normal")
    assert found["draws"]["high_noise"] == pytest.approx(0.014, abs=5e-4)
    assert found["options"]["density"] == "logit-normal" and len(found["warnings"]) == 1
    assert "low-noise expert gets" in check(run, 0.02, "--shift", 5)["warnings"][0]


def test_the_density_counts(run: Any) -> None:
    uniform = check(run, 0.9)["draws"]["high_noise"]
    noisy = check(run, 0.9, "--density", "logit-normal", "--logit-mean", 2)["draws"]["high_noise"]
    middle = check(run, 0.9, "--density", "mode")["draws"]["high_noise"]
    ends = check(run, 0.9, "--density", "mode", "--mode-scale", -0.8)["draws"]["high_noise"]
    assert uniform == pytest.approx(0.1) and noisy > ends > uniform > middle


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((875,), "between 0 and 1 as sigma; --as names another"),
        ((1000, "--as", "timestep"), "between 0 and 1000 as timestep"),
        ((0,), "boundary is 0"),
        ((0.9, "--as", "percent"), "'timestep', 'sigma', 'index', 'unshifted'"),
        ((0.9, "--shift", 0), "above 0"),
        ((0.9, "--mode-scale", 2), "at most 1.75"),
        ((), "ranges check --help"),
    ],
)
def test_mistakes_end_in_one_message(run: Any, arguments: tuple[Any, ...], message: str) -> None:
    done = run("ranges", "check", *arguments)
    assert (done.code, message in done.err, done.out) == (2, True, ""), done.err
