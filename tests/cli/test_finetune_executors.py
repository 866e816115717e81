"""`demerge finetune --executor`: options and config files that tasks read as they were written."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from demerge.errors import UsageError
from demerge.finetuning import FinetuneInputs, FinetuneOptions
from demerge.finetuning.executors.options import ExecutorOptions
from demerge.finetuning.executors.tasks import Task, write_config
from demerge.options import choices_of, types_of
from demerge.timesteps import TimestepRange

SPAN = TimestepRange(250, 500)
HOSTILE = "a b'c\"d $(touch x) `touch y`; é\n%j\\ -z #"


def changed(options: Any, special: dict[str, Any]) -> Any:
    """The options with another value in every field that has a simple type."""
    values = dict(special)
    for field in fields(options):
        value, choices = (
            getattr(options, field.name),
            choices_of(types_of(type(options))[field.name]),
        )
        if field.name in special:
            continue
        if choices:
            values[field.name] = choices[-1]
        elif isinstance(value, bool):
            values[field.name] = not value
        elif isinstance(value, int):
            values[field.name] = value + 2
        elif isinstance(value, float):
            values[field.name] = value * 0.875
    return replace(options, **values)


def test_a_config_holds_every_option(run, monkeypatch, tmp_path: Path) -> None:
    path = tmp_path / HOSTILE
    special = {"optimizer": "prodigy", "sampling": "mixture", "save_every": 5400.25}
    options = changed(FinetuneOptions(), special)
    inputs = FinetuneInputs(model=str(path), out=path / "out", data=str(path), ranges=str(path))
    inputs = changed(inputs, {"device": "cpu", "num_processes": None, "train_layers": path})
    config = write_config(tmp_path / "configs", Task(SPAN, inputs, options, 6))
    read: list[Any] = []

    def plan(*values: Any, **_: Any) -> None:
        read.extend(values)
        raise UsageError("enough")

    monkeypatch.setattr("demerge.finetuning.planning.plan", plan)
    monkeypatch.setattr("demerge.finetuning.plan", plan, raising=False)
    done = run("finetune", "--config", config, "--num-workers", 1, "--only", SPAN)
    assert "enough" in done.err
    assert read[0].document() == replace(inputs, only=(str(SPAN),)).document()
    assert read[1].document() == options.document()
    assert read[2] == ExecutorOptions(num_workers=1)


def test_settings_of_a_cluster_come_from_a_config_too(run, monkeypatch, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    values = {"executor": "slurm", "sbatch": {"partition": "gpu"}, "time_limit": "2h"}
    config.write_text(yaml.safe_dump(values))
    read: list[Any] = []

    def plan(inputs: Any, options: Any, execution: Any, **_: Any) -> None:
        read.append(execution)
        raise UsageError("enough")

    monkeypatch.setattr("demerge.finetuning.plan", plan, raising=False)
    run("finetune", "base", "--data", "digits", "-o", tmp_path / "e", "--config", config)
    assert (read[0].sbatch, read[0].time_limit) == ((("partition", "gpu"),), 7200)


@pytest.mark.parametrize(
    "text", ["partition", "=gpu", "comment=a b", "x='y'", "x=y\nz", "x=#", "A=1"]
)
def test_hostile_options_of_sbatch_are_refused(run, tiny: Path, tmp_path: Path, text: str) -> None:
    words = ("--data", "digits", "--executor", "slurm", "--sbatch", text)
    done = run("finetune", tiny, "-o", tmp_path / "e", *words)
    assert (done.code, "is not an option of sbatch" in done.err) == (2, True)
    assert not (tmp_path / "e").exists()


def test_options_that_demerge_sets_are_refused(run, tiny: Path, tmp_path: Path) -> None:
    words = ("--data", "digits", "--executor", "slurm", "--sbatch", "time=1:00:00")
    done = run("finetune", tiny, "-o", tmp_path / "e", *words)
    assert (done.code, "give --time-limit" in done.err) == (2, True)
