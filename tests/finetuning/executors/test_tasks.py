"""Tasks: what a worker reads is what the user wrote, and how several ends become one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from demerge.errors import Preempted, UsageError
from demerge.finetuning import FinetuneInputs, FinetuneOptions
from demerge.finetuning.executors.choice import choose
from demerge.finetuning.executors.options import ExecutorOptions
from demerge.finetuning.executors.tasks import (
    Outcome,
    Task,
    TasksFailed,
    run_task,
    settle,
)
from demerge.storage.lock import lock_folder
from demerge.timesteps import TimestepRange

SPANS = [TimestepRange(250 * i, 250 * (i + 1)) for i in range(4)]


def make_task(out: Path, model: Path | str = "base", **changes: Any) -> Task:
    options = FinetuneOptions(
        max_train_steps=6, train_batch_size=2, logging_steps=1, checkpointing_steps=1
    )
    inputs = FinetuneInputs(model=str(model), out=out, data="digits", device="cpu")
    return Task(SPANS[0], replace(inputs, **changes), options, 6)


def test_steps_are_read_from_the_log(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    assert task.steps_done() == 0
    log = tmp_path / "state" / "0000-0250" / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps({"step": 4}) + '\n{"step": 5, "lo')
    assert task.steps_done() == 4
    (tmp_path / "0000-0250").mkdir()
    (tmp_path / "0000-0250" / "expert.json").write_text("{}")
    assert (task.is_finished(), task.steps_done()) == (True, 6)


def test_the_first_failure_gives_the_exit_code() -> None:
    settle([Outcome(span) for span in SPANS], 4)
    ends = [
        Outcome(SPANS[0]),
        Outcome(SPANS[2], 75),
        Outcome(SPANS[3], 5, "NaN"),
        Outcome(SPANS[1], 3, "file"),
    ]
    with pytest.raises(TasksFailed, match="2 of 4 experts failed") as failed:
        settle(ends, 4)
    assert failed.value.exit_code == 5
    assert "0750-1000 (exit code 5): NaN; 0250-0500 (exit code 3): file" in failed.value.what
    with pytest.raises(Preempted, match="3 of 4 experts are not finished"):
        settle([Outcome(SPANS[0])], 4)


def test_a_task_waits_for_the_lock_of_a_process_that_ends(
    tiny: Path, tmp_path: Path, monkeypatch
) -> None:
    task = make_task(tmp_path / "e", tiny)
    with lock_folder(tmp_path / "e" / "state" / "0000-0250"):
        refused = run_task(task)
        assert (refused.code, "another process (pid" in refused.message) == (2, True)
    held = lock_folder(tmp_path / "e" / "state" / "0000-0250")
    held.__enter__()
    monkeypatch.setattr("time.sleep", lambda _: held.__exit__(None, None, None))
    assert run_task(task, patience=60.0) == Outcome(SPANS[0])
    assert run_task(task) == Outcome(SPANS[0])  # finished before
    assert [p.name for p in (tmp_path / "e").iterdir()] == ["0000-0250"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"submit": True}, "submit is True"),
        ({"executor": "ray", "num_workers": 2}, "num_workers is 2"),
        ({"retries": -1}, "retries is -1"),
        ({"time_limit": 60.0}, "time_limit is 60.0"),
        ({"executor": "pbs"}, "executor is 'pbs'"),
    ],
)
def test_options_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExecutorOptions(**changes)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (ExecutorOptions(executor="slurm"), "--executor slurm"),
        (ExecutorOptions(executor="ray"), "--executor ray"),
        (ExecutorOptions(num_workers=2), "--num-workers"),
    ],
)
def test_a_launcher_has_its_own_processes(monkeypatch, options: ExecutorOptions, name: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=f"{name} cannot be used under torchrun"):
        choose(options, "cpu")
    assert choose(ExecutorOptions(), "auto") is None


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    for options in (
        ExecutorOptions(executor="ray"),
        ExecutorOptions(executor="slurm", submit=True),
    ):
        with pytest.raises(UsageError, match="needs the package") as refused:
            choose(options, "cpu")
        assert refused.value.fix == "pip install 'demerge[cluster]'"
    assert choose(ExecutorOptions(executor="slurm"), "cpu") is not None
