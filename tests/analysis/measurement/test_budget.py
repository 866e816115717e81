"""How many groups: a budget of time and an error are kept, found groups count, and a map of M groups is the map of M groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demerge.analysis.measurement import collector as cells_module
from demerge.analysis.measurement.budget import StopRule, describe_se, neighbour_se
from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.collector import GradientCollector
from demerge.analysis.measurement.gradients import Measurement
from demerge.analysis.measurement.options import MeasurementOptions
from demerge.analysis.measurement.run import begin, measure
from demerge.analysis.similarity import similarity
from demerge.conflict import ConflictMap
from demerge.errors import ResourceError, UsageError
from demerge.progress import Progress, silent

SMALL: dict[str, Any] = {"bins": 3, "batch_size": 4}


def measured(
    model: Any, data: Any, *, mode: str = "auto", progress: Progress = silent, **options: Any
) -> ConflictMap:
    """Measure with options by name."""
    return measure(model, data, MeasurementOptions(**options), mode=mode, progress=progress)


def test_a_budget_holds_as_many_groups_as_fit(
    linear: Any, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by a second with each backward pass: 3 s a group, 8 of them in 25 s."""
    now = [0.0]
    kept = GradientCollector._reduced

    def slow(self: Any, *arguments: Any) -> Any:
        now[0] += 1.0
        return kept(self, *arguments)

    monkeypatch.setattr(GradientCollector, "_reduced", slow)
    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(cells_module.time, clock, lambda: now[0])
    run = begin(Measurement(linear, images, MeasurementOptions(**SMALL, groups=64, budget=25.0)))
    assert (run.cost.passes, run.cost.seconds, run.seconds) == (24, 24.0, 1.0)
    assert "24 backward passes, about 24 s" in str(run.cost)
    map = run.map()
    assert map.M == 8
    assert np.array_equal(map.gram, measured(linear, images, **SMALL, groups=8).gram)
    assert measured(linear, images, **SMALL, budget=25.0, groups=6).M == 6
    with pytest.raises(
        ResourceError, match="5 groups of 3 bins take about 15 s, and the budget is 11 s"
    ) as caught:
        measured(linear, images, **SMALL, budget=11.0)
    assert caught.value.fix == "give --budget 17s, or --bins 2, or --batch-size 2"


def test_groups_that_are_there_do_not_count_for_the_budget(
    linear: Any, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = MeasurementOptions(**SMALL, groups=64, budget=3.5)
    measurement = Measurement(linear, images, settings)
    partial = MeasurementCheckpoint(tmp_path, measurement.key())
    begin(Measurement(linear, images, MeasurementOptions(**SMALL, groups=5)), partial).map()
    monkeypatch.setattr(GradientCollector, "seconds", lambda self: 1.0)
    assert begin(measurement, partial).cost.passes == 18  # 5 groups and one more
    (tmp_path / "group-0004.safetensors").unlink()
    assert begin(measurement, partial).cost.seconds == 3.0
    (tmp_path / "group-0003.safetensors").unlink()
    with pytest.raises(ResourceError, match="5 groups"):
        begin(measurement, partial)


def test_groups_are_added_until_the_error_is_small(linear: Any, images: Any) -> None:
    sure = measured(linear, images, **SMALL, target_se=0.05)
    assert 5 <= sure.M < 64 and neighbour_se(sure) <= 0.05
    assert np.array_equal(sure.gram, measured(linear, images, **SMALL, groups=sure.M).gram)
    if sure.M > 5:
        assert neighbour_se(measured(linear, images, **SMALL, groups=sure.M - 1)) > 0.05
    assert measured(linear, images, **SMALL, target_se=1e-4, groups=6).M == 6
    assert describe_se(sure, 0.05).endswith("the target was 0.05")


def test_the_error_is_the_median_over_neighbours(planted: Any) -> None:
    map = planted([0, 3, 5, 8])
    se = similarity(map).cosine_se
    assert neighbour_se(map) == pytest.approx(np.median([se[i, i + 1] for i in range(7)]))
    assert describe_se(map, neighbour_se(map) / 3).endswith("about 72 groups would do")
    lost = planted([0, 3, 5, 8], noise=30.0)
    assert neighbour_se(lost) == np.inf and "not resolved" in describe_se(lost, 0.1)


def test_products_grow_with_the_rows(map_of: Any) -> None:
    rows = torch.randn(7, 3, 40, generator=torch.Generator().manual_seed(0))
    grams: list[Any] = []

    def spy(gram: Any) -> ConflictMap:
        grams.append(gram)
        return map_of(rows[: gram.shape[1]].transpose(0, 1).numpy())

    stop = StopRule(None, 1e-9, [], spy, 40, 0.0)
    assert not any(stop(rows[:m]) for m in (5, 6, 7))
    assert np.allclose(grams[-1], np.einsum("mid,njd->imjn", rows, rows), atol=1e-4)


def test_open_groups_fit_the_memory(linear: Any, images: Any) -> None:
    def most(**settings: Any) -> int:
        return Measurement(linear, images, MeasurementOptions(**SMALL, **settings)).most_groups

    cell = 4 * 2 * 9
    assert most(groups=64, target_se=0.1) == 64
    assert most(groups=64, target_se=0.1, memory=3 * cell * 20 / 1e9) == 20
    with pytest.raises(ResourceError, match="fewer bins or groups"):
        most(groups=64, memory=3 * cell * 20 / 1e9)
    with pytest.raises(ResourceError, match="15 gradients"):
        most(groups=64, target_se=0.1, memory=3 * cell * 4 / 1e9)
    with pytest.raises(UsageError, match="16,384 of a map"):
        most(groups=6000)
