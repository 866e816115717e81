"""What an analysis finds in OUT: the same map is taken, a smaller one extended, another one refused; one process at a time."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch

from demerge.analysis.measurement.options import AnalyzeInputs, MeasurementOptions
from demerge.analysis.partitioning.options import PartitionOptions
from demerge.analysis.planning.analyze import Plan, plan
from demerge.analysis.planning.ranges import load_map
from demerge.cli.main import main
from demerge.conflict import ConflictMap
from demerge.errors import InputError, UsageError
from demerge.parallel import World, join
from demerge.storage.atomic import sha256
from demerge.storage.lock import lock_folder

MAP = "conflict.safetensors"


@pytest.fixture(autouse=True)
def few_timed_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time two cells and not six: timing takes a good part of these tests."""
    monkeypatch.setattr("demerge.analysis.measurement.collector.TIMED", 2)


def planned(model: Path, out: Path, *, fisher: str | None = None, **settings: Any) -> Plan:
    inputs = AnalyzeInputs(model=str(model), data="digits", out=out, device="cpu", fisher=fisher)
    options = MeasurementOptions(**{"bins": 2, "batch_size": 2, **settings})
    return plan(inputs, options, PartitionOptions(ranges=2))


def describe(ready: Plan) -> str:
    return "\n".join(ready.describe())


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "exact"},
        {"engine": "sketch", "layers": True, "metric": "adam"},
        {"antithetic": "auto", "draws": "independent"},
    ],
    ids=["exact", "layers", "noise"],
)
def test_more_groups_extend_a_map_to_the_bytes_of_one_run(
    tiny: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    planned(tiny, tmp_path / "whole", groups=6, **settings).measure()
    out = tmp_path / "out"
    planned(tiny, out, groups=5, **settings).measure()
    more = planned(tiny, out, groups=6, **settings)
    assert "10 passes were done before" in describe(more)
    seen: list[str] = []
    more.measure(lambda done, total, what: seen.append(what))
    assert sum(what.startswith("bin") for what in seen) == 2
    assert sha256(out / MAP) == sha256(tmp_path / "whole" / MAP)


def test_a_map_that_suffices_is_taken_as_it_is(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(tiny, tmp_path, groups=6).measure()
    kept = sha256(tmp_path / MAP)
    for settings in (
        {},
        {"groups": 6},
        {"budget": 60.0},
        {"target_se": 100.0},
        {"target_se": 1e-9, "groups": 6},
    ):
        again = planned(tiny, tmp_path, **settings)
        assert "exists already" in describe(again), settings
        assert again.measure().M == 6
    assert sha256(tmp_path / MAP) == kept and [path.name for path in tmp_path.iterdir()] == [MAP]
    with pytest.raises(UsageError, match="groups was 6, now 5"):
        planned(tiny, tmp_path, groups=5)
    further = planned(tiny, tmp_path, target_se=1e-9, groups=7)
    assert "up to 14 backward passes, at most" in describe(further)
    monkeypatch.setattr("demerge.analysis.report.page.write_report", lambda *_, **__: [])
    assert further.run().lines()[-1].startswith("target SE ")
    assert ConflictMap.load(tmp_path / MAP).M == 7


def test_the_engine_left_open_is_that_of_the_map_that_is_there(tiny: Path, tmp_path: Path) -> None:
    planned(tiny, tmp_path, groups=5, engine="sketch").measure()
    assert "exists already, with 5 groups" in describe(planned(tiny, tmp_path))
    assert planned(tiny, tmp_path, groups=6).measure().origin.engine == "sketch-65521"


def test_more_groups_do_not_lose_the_layers(tiny: Path, tmp_path: Path) -> None:
    planned(tiny, tmp_path, groups=5, bins=2, layers=True).measure()
    assert planned(tiny, tmp_path, bins=2).measure().layers is not None
    with pytest.raises(UsageError, match="has sketches of layers"):
        planned(tiny, tmp_path, groups=6, bins=2)


def test_exact_gradients_that_a_map_does_not_hold_are_measured_again(
    make_tiny: Any, tmp_path: Path
) -> None:
    large = make_tiny(block_out_channels=(16, 32))
    five = planned(large, tmp_path / "out", groups=5, bins=2).measure()
    extended = planned(large, tmp_path / "out", groups=6, bins=2)
    assert "5 groups of the map are measured again, as it lacks exact gradients" in describe(
        extended
    )
    six = extended.measure()
    assert np.allclose(six.gram[:, :5, :, :5], five.gram, rtol=1e-4)
    assert np.array_equal(
        six.gram, planned(large, tmp_path / "anew", groups=6, bins=2).measure().gram
    )


def test_a_map_that_will_say_little_is_noted_early(tiny: Path, tmp_path: Path, map_of: Any) -> None:
    of, told = planned(tiny, tmp_path, groups=6, bins=2), []
    hidden = map_of(np.random.default_rng(0).standard_normal((2, 5, 400)) + 0.02)
    line = of.early_note(hidden)
    assert line is not None and line.startswith(
        "early     after 5 groups, gradients stand out from noise on 0% of the timesteps. Noise hides"
    )
    assert "would resolve half of it" in line and of.early_note(map_of(np.ones((2, 5, 4)))) is None
    assert of.pending is not None
    of.pending.map(early=lambda map: told.append(map.M))
    assert told == [5], "once, of the first groups"


@pytest.fixture
def rescheduled(tiny: Path, tmp_path: Path) -> Path:
    """The tiny base with other betas: the same weights on another schedule."""
    folder = copytree(tiny, tmp_path / "rescheduled")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "beta_schedule": "scaled_linear"})
    )
    return folder


def test_a_map_of_another_schedule_is_refused(
    tiny: Path, rescheduled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    planned(tiny, out, groups=5).measure()
    with pytest.raises(
        UsageError, match=r"schedule was 'of 1000 timesteps with log SNR 9.*, now 'of 1000 "
    ):
        planned(rescheduled, out, groups=5)
    assert load_map(out, str(tiny)).M == 5
    with pytest.raises(InputError, match="was measured on a schedule of 1000 timesteps"):
        load_map(out, str(rescheduled))
    assert load_map(out, str(rescheduled / "unet" / "diffusion_pytorch_model.safetensors")).M == 5


def test_groups_of_another_schedule_are_refused(
    tiny: Path, rescheduled: Path, tmp_path: Path
) -> None:
    first = planned(tiny, tmp_path / "out", groups=5)
    assert first.pending is not None
    first.pending.map()
    with pytest.raises(
        UsageError, match=r"parts of another measurement: schedule was 'of 1000 timesteps"
    ):
        planned(rescheduled, tmp_path / "out", groups=5)


def test_a_map_of_another_config_is_refused(tiny: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", copytree(tiny, tmp_path / "other")
    config = other / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "norm_eps": 1e-3}))
    planned(tiny, out, groups=5).measure()
    with pytest.raises(UsageError, match="was measured with other settings: base was "):
        planned(other, out, groups=5)


def test_two_at_once_do_not_mix(tiny: Path, tmp_path: Path) -> None:
    ready = planned(tiny, tmp_path, groups=5)
    with (
        lock_folder(tmp_path / "conflict.partial"),
        pytest.raises(UsageError, match=rf"pid {os.getpid()} on {socket.gethostname()}"),
    ):
        ready.measure()
    assert not (tmp_path / MAP).exists()
    late = planned(tiny, tmp_path, groups=5, seed=1)
    assert ready.measure().M == 5
    assert [path.name for path in tmp_path.iterdir()] == [MAP]
    with pytest.raises(UsageError, match=r"has finished .* meanwhile"):
        late.measure()


def test_one_process_is_alone() -> None:
    assert join("cpu") == (World(), "cpu") and World().is_main
    assert World().broadcast_number(0.5) == 0.5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"antithetic": "auto"}, id="fixed", marks=pytest.mark.slow),
        pytest.param({"antithetic": "auto", "target_se": 1e-6}, id="open"),
        pytest.param({"bins": 4, "fisher": "uniform:2"}, id="fisher"),
        pytest.param(
            {"bins": 4, "fisher": "joint", "target_se": 1e-6},
            id="open fisher",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_make_the_map_of_one(
    tiny: Path, tmp_path: Path, settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """With the variables that torchrun sets; a process that is not the first prints and writes nothing but its groups."""
    torch.set_num_threads(1)
    common: dict[str, Any] = {"bins": 2, "groups": 7, "metric": "adam"}
    planned(tiny, tmp_path / "one", **{**common, **settings, "target_se": None}).measure()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                os.environ.update({**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                code = (_first if rank == 0 else _other)(tiny, tmp_path / "two", common, settings)
            finally:
                os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert capfd.readouterr().out == ""
    one, two = (
        {p.relative_to(out): sha256(p) for p in out.rglob("*.*")}
        for out in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and len(one) == {"uniform:2": 5, "joint": 3}.get(
        settings.get("fisher", ""), 1
    )


def _first(tiny: Path, out: Path, common: dict[str, Any], settings: dict[str, Any]) -> int:
    ready = planned(tiny, out, **{**common, **settings})
    ready.measure()
    return 0 if "shared by 2 processes" in describe(ready) else 3


def _other(tiny: Path, out: Path, common: dict[str, Any], settings: dict[str, Any]) -> int:
    given = {
        "data": "digits",
        "batch-size": 2,
        "ranges": 2,
        "device": "cpu",
        **common,
        **settings,
    }
    options = [
        word
        for name, value in given.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    sys.argv = ["demerge", "analyze", str(tiny), *options, "-o", str(out)]
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 4
