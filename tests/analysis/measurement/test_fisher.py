"""The Fisher of ranges from the pass of the map: unbiased, never negative, resumable, and what merge takes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from demerge.analysis.measurement import fisher as estimator
from demerge.analysis.measurement import fisher_files
from demerge.analysis.measurement.backward import Backward
from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.fisher import RangeFisher
from demerge.analysis.measurement.fisher_files import plan_fisher
from demerge.analysis.measurement.gradients import Measurement
from demerge.analysis.measurement.options import AnalyzeInputs, MeasurementOptions
from demerge.analysis.measurement.run import NOWHERE, begin
from demerge.analysis.measurement.samples import draw
from demerge.analysis.partitioning.options import PartitionOptions
from demerge.analysis.planning.analyze import Plan, plan
from demerge.errors import ResourceError, UsageError
from demerge.statistics import range_fisher
from demerge.timesteps import Partition


@pytest.fixture(autouse=True)
def few_timed_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time two cells and not six: timing takes a good part of these tests."""
    monkeypatch.setattr("demerge.analysis.measurement.collector.TIMED", 2)


def found(
    model: Any, data: Any, out: Path, ranges: str = "uniform:2", mode: str = "auto", **settings: Any
) -> list[Tensor]:
    """F [D] of each range of one measurement."""
    measurement = Measurement(
        model,
        data,
        MeasurementOptions(**{"bins": 6, "groups": 5, "batch_size": 4, **settings}),
        mode,
    )
    fisher = replace(plan_fisher(measurement, ranges, out).fisher, checkpoint=NOWHERE)
    begin(measurement, NOWHERE, fisher=fisher).map()
    return flat(fisher, model)


def flat(fisher: RangeFisher, model: Any) -> list[Tensor]:
    """F [D] of each range."""
    return [
        torch.cat([t.flatten() for t in fisher.means(r, model.denoiser).values()])
        for r in range(len(fisher.ranges))
    ]


def truth(model: Any, data: Any, edges: list[int], n: int = 100_000) -> list[Tensor]:
    """E[g^2] [D] of f = theta x in each range, from n examples: g = 2/P x_t (theta x_t - eps)."""
    g = torch.Generator().manual_seed(5)
    x0 = data.floats(range(len(data))).flatten(1)[torch.randint(len(data), (n,), generator=g)]
    theta, means = model.denoiser.theta.detach().flatten(), []
    for start, stop in pairwise(edges):
        abar = model.alphas_cumprod[torch.randint(start, stop, (n,), generator=g)].float()[:, None]
        eps = torch.randn(x0.shape, generator=g)
        x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
        means.append((2 / len(theta) * x_t * (theta * x_t - eps)).square().mean(0))
    return means


# -- the estimator -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "draws", "seeds"), [(2, "shared", 30), (4, "independent", 20)])
def test_it_is_unbiased_and_never_negative(
    linear: Any,
    images: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts: int,
    draws: str,
    seeds: int,
) -> None:
    monkeypatch.setattr(estimator, "MAX_PARTS", parts)
    runs = [found(linear, images, tmp_path, draws=draws, seed=seed) for seed in range(seeds)]
    for r, wanted in enumerate(truth(linear, images, [0, 15, 30])):
        values = torch.stack([run[r] for run in runs])
        assert bool((values >= 0).all())
        z = (values.mean(0) - wanted) / (values.std(0) / len(runs) ** 0.5)
        assert float(z.abs().max()) < 4
        assert float(values.mean() / wanted.mean()) == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("batch_size", [4, 1])
def test_microbatches_of_one_are_the_squares_of_examples(
    linear: Any, images: Any, tmp_path: Path, batch_size: int
) -> None:
    of = found(linear, images, tmp_path, "joint", batch_size=batch_size)
    squares = []
    for m in range(5):
        samples = draw(linear, images, m, batch_size, 0, False)
        for span in Partition.uniform(30, 6):
            for b in range(batch_size):
                loss = samples.select(slice(b, b + 1)).loss(linear, span)
                squares.append(
                    torch.autograd.grad(loss, linear.denoiser.theta)[0].flatten().square()
                )
    torch.testing.assert_close(of[0], torch.stack(squares).mean(0), rtol=1e-4, atol=1e-9)


def test_bins_count_by_their_width(linear: Any, images: Any, tmp_path: Path) -> None:
    """T = 30 in 7 bins: 5 4 4 4 4 5 4 or so; the joint Fisher is the mean over timesteps of that of the ranges."""
    bins = Partition.uniform(30, 7)
    cut = bins.cuts[3]
    Partition.from_cuts(30, [cut]).save(tmp_path / "two.json")
    two = found(linear, images, tmp_path, str(tmp_path / "two.json"), bins=7)
    one = found(linear, images, tmp_path, "joint", bins=7)
    torch.testing.assert_close(one[0], (cut * two[0] + (30 - cut) * two[1]) / 30)


def test_modes_and_metrics_give_one_fisher_and_it_leaves_the_map(
    linear: Any, images: Any, tmp_path: Path
) -> None:
    first = found(linear, images, tmp_path)
    for more in ({"mode": "hooks"}, {"metric": "adam"}, {"engine": "sketch"}):
        for one, other in zip(first, found(linear, images, tmp_path, **more), strict=True):
            torch.testing.assert_close(one, other)
    measurement = Measurement(linear, images, MeasurementOptions(bins=6, groups=5, batch_size=4))
    fisher = plan_fisher(measurement, "uniform:2", tmp_path).fisher
    with_it, without = (
        begin(measurement, NOWHERE, fisher=replace(fisher, checkpoint=NOWHERE)).map(),
        begin(measurement).map(),
    )
    np.testing.assert_allclose(
        with_it.gram, without.gram, rtol=1e-3, atol=1e-7 * without.gram.max()
    )


def test_a_microbatch_has_timesteps_from_all_of_a_bin(linear: Any, images: Any) -> None:
    samples = draw(linear, images, 0, 8, 0, False)
    parts = [samples.select(slice(j, None, 2)) for j in range(2)]
    assert [part.images for part in parts] == [samples.images[0::2], samples.images[1::2]]
    for part in parts:
        assert sorted((part.position * 4).long().tolist()) == [0, 1, 2, 3]


def test_it_resembles_what_stats_measures(tiny: Path, tmp_path: Path) -> None:
    from demerge.data import load_images
    from demerge.diffusion.model import Diffusion

    model, data = Diffusion.load(tiny), load_images("digits", split="train", limit=40)
    of = found(
        model, data, tmp_path, "uniform:1", bins=2, groups=5, batch_size=8, draws="independent"
    )[0]
    per_example = range_fisher(model, data, Partition.uniform(1000, 1)[0], samples=64).tensors
    other = torch.cat(
        [per_example[name].flatten() for name in dict(model.denoiser.named_parameters())]
    )
    assert float(of.sum() / other.sum()) == pytest.approx(1, abs=0.5)
    assert (
        float(
            torch.corrcoef(torch.stack([of.clamp(min=1e-20).log(), other.clamp(min=1e-20).log()]))[
                0, 1
            ]
        )
        > 0.9
    )


# -- what is kept ------------------------------------------------------------------------------------------------------------


def describe(ready: Plan) -> str:
    return "\n".join(ready.describe())


class Killed(Exception):
    """Stands for SIGKILL."""


def killed_after(passes: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, what: str) -> None:
        if done >= passes:
            raise Killed

    return progress


@pytest.mark.parametrize("passes", [7, 12, 30])
def test_a_killed_measurement_goes_on(
    linear: Any, images: Any, tmp_path: Path, passes: int
) -> None:
    measurement = Measurement(linear, images, MeasurementOptions(bins=6, groups=5, batch_size=4))
    partial = MeasurementCheckpoint(tmp_path / "conflict.partial", measurement.key())
    wanted = found(linear, images, tmp_path)
    with pytest.raises(Killed):
        begin(
            measurement, partial, fisher=plan_fisher(measurement, "uniform:2", tmp_path).fisher
        ).map(killed_after(passes))
    there = sorted(
        path.name for path in (tmp_path / "conflict.partial" / "fisher").glob("*.safetensors")
    )
    assert there == [f"{(passes - 1) // 6 - 1:04d}.safetensors"]
    seen: list[int] = []
    again = plan_fisher(measurement, "uniform:2", tmp_path).fisher
    begin(measurement, partial, fisher=again).map(lambda done, total, text: seen.append(done))
    assert len(seen) == 30 - (passes - 1) // 6 * 6
    for one, other in zip(flat(again, linear), wanted, strict=True):
        assert torch.equal(one, other)


def test_rows_and_sums_of_different_age_are_mended(
    linear: Any, images: Any, tmp_path: Path
) -> None:
    """Rows of all groups without a Fisher, then a Fisher with one row damaged: each is made once, and none counts twice."""
    measurement = Measurement(linear, images, MeasurementOptions(bins=6, groups=5, batch_size=4))
    partial = MeasurementCheckpoint(tmp_path / "conflict.partial", measurement.key())
    begin(measurement, partial).map()
    wanted = found(linear, images, tmp_path)
    for damaged in (None, "group-0002.safetensors"):
        if damaged is not None:
            (tmp_path / "conflict.partial" / damaged).write_bytes(b"x")
        fisher = plan_fisher(measurement, "uniform:2", tmp_path).fisher
        begin(measurement, partial, fisher=fisher).map()
        for one, other in zip(flat(fisher, linear), wanted, strict=True):
            assert torch.equal(one, other)


def test_the_stage_writes_what_merge_takes(
    tiny: Path, tmp_path: Path, add_expert: Callable[..., Path]
) -> None:
    from demerge.merging import merge

    out = tmp_path / "conflict"
    planned(tiny, out, groups=5, fisher=None).measure()
    kept = (out / "conflict.safetensors").read_bytes()
    ready = planned(tiny, out, groups=5)
    assert "fisher    0000-0500 0500-1000: 2 passes of 1 samples" in describe(ready)
    ready.measure()
    assert (out / "conflict.safetensors").read_bytes() == kept
    assert not (out / "conflict.partial").exists()
    assert "nothing" in describe(planned(tiny, out, groups=5))
    with pytest.raises(UsageError, match="seed"):
        planned(tiny, out, groups=5, seed=1)
    paths = [out / "fisher" / name / "fisher.safetensors" for name in ("0000-0500", "0500-1000")]
    weights = load_file(tiny / "unet" / "diffusion_pytorch_model.safetensors")
    for path in paths:
        tensors = load_file(path)
        assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
            n: (t.shape, t.dtype) for n, t in weights.items()
        }
    experts = [
        add_expert(tmp_path / "experts" / path.parent.name, *map(int, path.parent.name.split("-")))
        for path in paths
    ]
    merge(
        tiny,
        experts,
        tmp_path / "merged",
        method="fisher",
        options={"fisher": ",".join(map(str, paths))},
    )
    assert (tmp_path / "merged" / "demerge.json").is_file()


def planned(model: Path, out: Path, *, fisher: str | None = "uniform:2", **settings: Any) -> Plan:
    """Plan a map of two bins, and the Fisher of two ranges next to it."""
    inputs = AnalyzeInputs(model=str(model), data="digits", out=out, device="cpu", fisher=fisher)
    options = MeasurementOptions(**{"bins": 2, "batch_size": 2, **settings})
    return plan(inputs, options, PartitionOptions(ranges=2))


def recorded(out: Path) -> list[tuple[int, int]]:
    """Return groups and samples of the records."""
    records = [
        json.loads(path.read_text())["fisher"]["options"]
        for path in sorted((out / "fisher").glob("*/stats.json"))
    ]
    return [(record["groups"], record["samples"]) for record in records]


def test_it_has_the_groups_of_the_map_that_is_there(tiny: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    planned(tiny, whole, groups=6).measure()
    planned(tiny, out, groups=6, fisher=None).measure()
    ready = planned(tiny, out)
    assert ready.cost().steps + ready.measurement_cost.extra == 2 * 6 * 2
    assert "24 backward passes, about" in describe(
        ready
    ) and "6 groups of the map are measured again" in describe(ready)
    assert ready.measure().M == 6 and recorded(out) == recorded(whole) == [(6, 12), (6, 12)]
    for path in (whole / "fisher").rglob("*.safetensors"):
        assert path.read_bytes() == (out / path.relative_to(whole)).read_bytes()


def test_more_groups_make_map_and_fisher_of_all_of_them(tiny: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    planned(tiny, whole, groups=6).measure()
    planned(tiny, out, groups=5).measure()
    ready = planned(tiny, out, groups=6)
    assert "24 backward passes" in describe(
        ready
    ) and "5 groups of the map are measured again" in describe(ready)
    assert "in place of the one of 5 groups" in describe(ready)
    assert ready.measure().M == 6 and recorded(out) == [(6, 12), (6, 12)]
    for path in whole.rglob("*.*"):
        assert path.read_bytes() == (out / path.relative_to(whole)).read_bytes()
    (out / "conflict.safetensors").unlink()
    with pytest.raises(UsageError, match="groups was 6, now 5"):
        planned(tiny, out, groups=5)


def test_killed_while_the_files_are_written_no_record_stands_beside_another_fisher(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(tiny, tmp_path, groups=5).measure()
    files, commit = (
        sorted((tmp_path / "fisher").rglob("*.safetensors")),
        fisher_files.commit_statistic,
    )

    def killed(folder: Path, *arguments: Any) -> None:
        if folder.name == "0500-1000":
            raise Killed
        commit(folder, *arguments)

    monkeypatch.setattr(fisher_files, "commit_statistic", killed)
    with pytest.raises(Killed):
        planned(tiny, tmp_path, groups=6).measure()
    assert [path.exists() for path in files] == [True, True] and recorded(tmp_path) == [
        (6, 12),
        (5, 10),
    ]
    monkeypatch.undo()
    ready, seen = planned(tiny, tmp_path), []
    assert "again" not in describe(ready)
    ready.measure(lambda done, total, what: seen.append(done))
    assert not seen and recorded(tmp_path) == [(6, 12), (6, 12)]


def test_a_fisher_of_fewer_groups_than_the_map_is_made_again(tiny: Path, tmp_path: Path) -> None:
    planned(tiny, tmp_path, groups=5, engine="sketch").measure()
    planned(tiny, tmp_path, groups=6, engine="sketch", fisher=None).measure()
    assert recorded(tmp_path) == [(5, 10), (5, 10)]
    planned(tiny, tmp_path).measure()
    assert recorded(tmp_path) == [(6, 12), (6, 12)]


def test_sums_of_a_killed_run_serve_one_of_more_groups(
    linear: Any, images: Any, tmp_path: Path
) -> None:
    few, many = (
        Measurement(linear, images, MeasurementOptions(bins=6, groups=groups, batch_size=4))
        for groups in (5, 8)
    )
    partial = MeasurementCheckpoint(tmp_path / "conflict.partial", few.key())
    begin(few, partial, fisher=plan_fisher(few, "uniform:2", tmp_path).fisher).map()
    again, seen = plan_fisher(many, "uniform:2", tmp_path).fisher, []
    assert again.committed == 5
    begin(many, partial, fisher=again).map(lambda done, total, text: seen.append(done))
    assert len(seen) == 3 * 6
    for one, other in zip(
        flat(again, linear), found(linear, images, tmp_path, groups=8), strict=True
    ):
        assert torch.equal(one, other)


def test_more_groups_with_a_fisher_do_not_lose_the_layers(tiny: Path, tmp_path: Path) -> None:
    planned(tiny, tmp_path, groups=5, layers=True, fisher=None).measure()
    with pytest.raises(UsageError, match="has sketches of layers"):
        planned(tiny, tmp_path, groups=6)


def test_the_cost_counts_microbatches_and_a_budget_too(
    linear: Any, images: Any, tmp_path: Path, clock: list[float]
) -> None:
    """By a clock that goes on by a second with each backward pass: 6 bins of 4 samples, 24 s a group, 6 of them in 150 s."""
    measurement = Measurement(
        linear, images, MeasurementOptions(bins=6, groups=64, batch_size=4, budget=150.0)
    )
    partial = MeasurementCheckpoint(tmp_path / "conflict.partial", measurement.key())
    fisher = plan_fisher(measurement, "uniform:2", tmp_path).fisher
    run = begin(measurement, partial, fisher=fisher)
    assert (run.cost.passes, run.cost.extra, run.cost.seconds) == (36, 108, 144.0)
    assert "144 backward passes, about 2" in str(run.cost)
    assert run.map().M == fisher.done == 6
    with pytest.raises(ResourceError, match="5 groups of 6 bins take about 2 min"):
        begin(
            Measurement(
                linear, images, MeasurementOptions(bins=6, groups=64, batch_size=4, budget=100.0)
            ),
            fisher=fisher,
        )


def test_a_budget_that_a_fisher_of_the_map_does_not_fit_is_refused(
    tiny: Path, tmp_path: Path
) -> None:
    planned(tiny, tmp_path, groups=5, fisher=None).measure()
    with pytest.raises(ResourceError, match="the Fisher of the map's 5 groups takes about"):
        planned(tiny, tmp_path, budget=1e-4)
    assert planned(tiny, tmp_path, budget=600.0).measure().M == 5 and recorded(tmp_path) == [
        (5, 10),
        (5, 10),
    ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that goes on by a second with each backward pass."""
    now, call = [0.0], Backward.__call__

    def slow(self: Any, *arguments: Any) -> None:
        now[0] += 1.0
        call(self, *arguments)

    monkeypatch.setattr(Backward, "__call__", slow)
    for name in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, lambda: now[0])
    return now


# -- bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "ranges", "message"),
    [
        ({}, "uniform:4", "have edges inside of bins: 8, 22"),
        ({"batch_size": 11}, "joint", "2 to 8 equal parts of a batch of 11"),
        ({"antithetic": "on"}, "joint", "needs independent samples"),
        ({"params": "theta"}, "joint", "does not merge a model"),
        ({}, "unifrom:2", "neither uniform:N"),
    ],
)
def test_what_makes_no_fisher_is_refused(
    linear: Any, images: Any, tmp_path: Path, settings: dict[str, Any], ranges: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        found(linear, images, tmp_path, ranges, **{"batch_size": 4, **settings})


def test_sums_of_other_ranges_are_refused(linear: Any, images: Any, tmp_path: Path) -> None:
    measurement = Measurement(linear, images, MeasurementOptions(bins=6, groups=5, batch_size=4))
    partial = MeasurementCheckpoint(tmp_path / "conflict.partial", measurement.key())
    begin(measurement, partial, fisher=plan_fisher(measurement, "uniform:2", tmp_path).fisher).map()
    with pytest.raises(UsageError, match=r"fisher was \[0, 15, 30\], now \[0, 10, 20, 30\]"):
        plan_fisher(measurement, "uniform:3", tmp_path)
