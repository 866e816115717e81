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

from demerge.analysis.measurement.lock import alone_in
from demerge.analysis.measurement.parallel import World, join
from demerge.analysis.stages.analyze import Plan, prepare
from demerge.analysis.stages.ranges import load_map
from demerge.cli.main import main
from demerge.conflict import ConflictMap
from demerge.errors import InputError, UsageError
from demerge.storage.atomic import sha256

MAP = "conflict.safetensors"


def plan(model: Path, out: Path, **settings: Any) -> Plan:
    return prepare(
        str(model), "digits", out, **{"bins": 3, "batch_size": 2, "ranges": 2, **settings}
    )


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
    plan(tiny, tmp_path / "whole", groups=6, **settings).map()
    out = tmp_path / "out"
    plan(tiny, out, groups=5, **settings).map()
    more = plan(tiny, out, groups=6, **settings)
    assert "15 passes were done before" in str(more)
    seen: list[str] = []
    more.map(lambda done, total, what: seen.append(what))
    assert sum(what.startswith("bin") for what in seen) == 3
    assert sha256(out / MAP) == sha256(tmp_path / "whole" / MAP)


def test_a_map_that_suffices_is_taken_as_it_is(tiny: Path, tmp_path: Path) -> None:
    plan(tiny, tmp_path, groups=6).map()
    kept = sha256(tmp_path / MAP)
    for settings in ({}, {"groups": 6}, {"budget": 60.0}, {"se": 100.0}, {"se": 1e-9, "groups": 6}):
        again = plan(tiny, tmp_path, **settings)
        assert "there already" in str(again), settings
        assert again.map().M == 6
    assert sha256(tmp_path / MAP) == kept and [path.name for path in tmp_path.iterdir()] == [MAP]
    with pytest.raises(UsageError, match="groups 6 there, 5 asked"):
        plan(tiny, tmp_path, groups=5)
    further = plan(tiny, tmp_path, se=1e-9, groups=7)
    assert "up to 21 backward passes, at most" in str(further)
    assert (
        further.lines(further.map())[0].startswith("se ")
        and ConflictMap.load(tmp_path / MAP).M == 7
    )


def test_the_engine_left_open_is_that_of_the_map_that_is_there(tiny: Path, tmp_path: Path) -> None:
    plan(tiny, tmp_path, groups=5, engine="sketch").map()
    assert "there already, with 5 groups" in str(plan(tiny, tmp_path))
    assert plan(tiny, tmp_path, groups=6).map().origin.engine == "sketch-65521"


def test_more_groups_do_not_lose_the_layers(tiny: Path, tmp_path: Path) -> None:
    plan(tiny, tmp_path, groups=5, bins=2, layers=True).map()
    assert plan(tiny, tmp_path, bins=2).map().layers is not None
    with pytest.raises(UsageError, match="has sketches of layers"):
        plan(tiny, tmp_path, groups=6, bins=2)


def test_exact_gradients_that_a_map_does_not_hold_are_measured_again(
    make_tiny: Any, tmp_path: Path
) -> None:
    large = make_tiny(block_out_channels=(16, 32))
    five = plan(large, tmp_path / "out", groups=5, bins=2).map()
    extended = plan(large, tmp_path / "out", groups=6, bins=2)
    assert "5 groups of the map are measured again, as their exact gradients are not kept" in str(
        extended
    )
    six = extended.map()
    assert np.allclose(six.gram[:, :5, :, :5], five.gram, rtol=1e-4)
    assert np.array_equal(six.gram, plan(large, tmp_path / "anew", groups=6, bins=2).map().gram)


def test_a_map_that_will_say_little_is_told_of_early(
    tiny: Path, tmp_path: Path, map_of: Any
) -> None:
    of, told = plan(tiny, tmp_path, groups=6, bins=2), []
    hidden = map_of(np.random.default_rng(0).standard_normal((2, 5, 400)) + 0.02)
    (line,) = of.early(hidden)
    assert line.startswith(
        "early     after 5 groups gradients are resolved on 0% of [0, T); the joint gradient is not told from 0"
    )
    assert "would do" in line and of.early(map_of(np.ones((2, 5, 4)))) == []
    assert of.run is not None
    of.run.map(early=lambda map: told.append(map.M))
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
    plan(tiny, out, groups=5).map()
    with pytest.raises(
        UsageError, match=r"schedule of 1000 timesteps with log SNR 9.* there, of 1000 .* asked"
    ):
        plan(rescheduled, out, groups=5)
    assert load_map(out, str(tiny)).M == 5
    with pytest.raises(InputError, match="was measured on a schedule of 1000 timesteps"):
        load_map(out, str(rescheduled))
    assert load_map(out, str(rescheduled / "unet" / "diffusion_pytorch_model.safetensors")).M == 5


def test_groups_of_another_schedule_are_refused(
    tiny: Path, rescheduled: Path, tmp_path: Path
) -> None:
    first = plan(tiny, tmp_path / "out", groups=5)
    assert first.run is not None
    first.run.map()
    with pytest.raises(
        UsageError, match=r"parts of another measurement: schedule of 1000 timesteps"
    ):
        plan(rescheduled, tmp_path / "out", groups=5)


def test_a_map_of_another_config_is_refused(tiny: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", copytree(tiny, tmp_path / "other")
    config = other / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "norm_eps": 1e-3}))
    plan(tiny, out, groups=5).map()
    with pytest.raises(UsageError, match="is of another measurement: base "):
        plan(other, out, groups=5)


def test_two_at_once_do_not_mix(tiny: Path, tmp_path: Path) -> None:
    ready = plan(tiny, tmp_path, groups=5)
    with (
        alone_in(tmp_path / "conflict.partial"),
        pytest.raises(UsageError, match=rf"pid {os.getpid()} on {socket.gethostname()}"),
    ):
        ready.map()
    assert not (tmp_path / MAP).exists()
    late = plan(tiny, tmp_path, groups=5, seed=1)
    assert ready.map().M == 5
    assert [path.name for path in tmp_path.iterdir()] == [MAP]
    with pytest.raises(UsageError, match=r"has finished .* meanwhile"):
        late.map()


def test_one_process_is_alone() -> None:
    assert join("cpu") == (World(), "cpu") and World().main
    assert World().agree(0.5) == 0.5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "settings",
    [
        {"antithetic": "auto"},
        {"antithetic": "auto", "se": 1e-6},
        {"bins": 4, "fisher": "uniform:2"},
        {"bins": 4, "fisher": "joint", "se": 1e-6},
    ],
    ids=["fixed", "open", "fisher", "open fisher"],
)
def test_two_processes_make_the_map_of_one(
    tiny: Path, tmp_path: Path, settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """With the variables that torchrun sets; a process that is not the first prints and writes nothing but its groups."""
    torch.set_num_threads(1)
    common: dict[str, Any] = {"bins": 2, "groups": 7, "metric": "adam"}
    plan(tiny, tmp_path / "one", **{**common, **settings, "se": None}).map()
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
    ready = plan(tiny, out, **{**common, **settings})
    ready.map()
    return 0 if "shared by 2 processes" in str(ready) else 3


def _other(tiny: Path, out: Path, common: dict[str, Any], settings: dict[str, Any]) -> int:
    given = {
        "data": "digits",
        "train-batch-size": 2,
        "ranges": 2,
        "device": "cpu",
        **common,
        **settings,
    }
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    sys.argv = ["demerge", "analyze", str(tiny), *options, "-o", str(out)]
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 4
