"""What a notebook shows of demerge: the names of the package, and values in one short line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import demerge
from demerge.analysis import MeasurementOptions
from demerge.evaluation import EvaluationOptions
from demerge.merging import MergeSession, Recipe, find_method, merge
from demerge.merging import plan as plan_merge

MOST = 300


def test_the_public_names_are_listed() -> None:
    assert set(demerge.__all__) <= set(dir(demerge))
    assert demerge.__all__ == sorted(demerge.HOMES)


def test_the_stages_are_there_at_the_first_use() -> None:
    names = "[name for name in demerge.STAGES if name not in dir(demerge)]"
    code = f"import demerge; print({names}, demerge.finetuning.FinetuneOptions)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.stdout.startswith("[] <class"), found.stderr


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (demerge.FinetuneOptions(), "FinetuneOptions()"),
        (
            demerge.FinetuneOptions(learning_rate=1e-3, seed=2),
            "FinetuneOptions(learning_rate=0.001, seed=2)",
        ),
        (EvaluationOptions(steps=20, seeds=(0,)), "EvaluationOptions(steps=20, seeds=(0,))"),
        (MeasurementOptions(groups=12), "MeasurementOptions(groups=12)"),
        (find_method("average"), "Method(average, arXiv 2203.05482: no options)"),
    ],
)
def test_options_show_what_was_chosen(value: object, text: str) -> None:
    assert repr(value) == text


def test_values_are_one_short_line(tiny: Path, add_expert: Callable[..., Path]) -> None:
    folder = tiny.parent / "of-reprs"
    experts = [add_expert(folder / str(i), 500 * i, 500 * i + 500) for i in range(2)]
    values: list[Any] = [
        demerge.Diffusion.load(tiny),
        MergeSession(tiny, experts),
        plan_merge(Recipe.of(tiny, experts, method="ties")),
        merge(tiny, experts, folder / "merged", method="average"),
    ]
    for value in values:
        text = repr(value).replace(str(tiny.parent), "")
        assert (
            text.startswith(f"{type(value).__name__}(") and "\n" not in text and len(text) < MOST
        ), text
