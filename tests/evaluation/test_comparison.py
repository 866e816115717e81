"""Models compared in one call, in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import demerge.evaluation
from demerge import Diffusion, load_images
from demerge.errors import UsageError
from demerge.evaluation import compare
from demerge.evaluation.planning import EvaluationOptions
from demerge.reporting.html import render_page

QUICK = {"num_images": 70, "steps": 2, "lpips": False, "ranges": "none"}


def test_models_in_memory_are_compared(make_tiny: Callable[..., Path]) -> None:
    paths = [make_tiny(seed=0), make_tiny(seed=1)]
    models = {"base": paths[0], "mine": Diffusion.load(paths[1])}
    kinds = {"mine": "merge"}
    report = compare(models, load_images("digits", split="test"), kinds=kinds, **QUICK)  # type: ignore[arg-type]
    assert sorted(report.table["model"]) == ["base", "mine"]
    assert sorted(report.table["kind"]) == ["base", "merge"]
    assert set(report.table["seeds"]) == {"0 1 2"}
    assert "The best merge, mine" in report.verdict
    assert len(report.contact_sheet().axes) == 2 * 16
    assert report.plot().axes
    assert "<table>" in report.html


def test_the_same_call_goes_on_where_it_stopped(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    models = {"base": make_tiny(seed=0), "mine": make_tiny(seed=1)}
    first = compare(models, "digits", seeds=[0], out=tmp_path, **QUICK)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()}
    second = compare(models, "digits", seeds=[0], out=str(tmp_path), **QUICK)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()} == written
    assert second.table.equals(first.table)
    assert [floor.model for floor in first.ranked.floors] == ["digits train"]


def test_models_of_unlike_shape_and_plots_are_refused_at_once(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "index.html").write_text(render_page("What the merge did", "", [], ""))
    with pytest.raises(UsageError, match="plots that demerge wrote"):
        compare({"base": make_tiny(seed=0), "ties": tmp_path / "plots"}, "digits", **QUICK)


def test_the_package_names_what_it_offers() -> None:
    assert set(demerge.evaluation.__all__) <= set(dir(demerge.evaluation))
    assert demerge.evaluation.EvaluationOptions is EvaluationOptions
    with pytest.raises(AttributeError):
        demerge.evaluation.nothing  # noqa: B018
