"""The job array of Slurm: its script run by bash with a fake scontrol, and submitit on this machine."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from demerge.errors import UsageError
from demerge.finetuning import FinetuneInputs, FinetuneOptions, plan
from demerge.finetuning.executors.options import ExecutorOptions
from demerge.finetuning.executors.slurm import SlurmExecutor
from demerge.finetuning.executors.tasks import Task
from demerge.progress import silent
from demerge.timesteps import TimestepRange

FAST = FinetuneOptions(max_train_steps=2, train_batch_size=2, logging_steps=1)
HOSTILE = "a b'c\"d $(touch x) `touch y`; é\n%j\\ -z #"
SPANS = (TimestepRange(0, 500), TimestepRange(500, 1000))


def inputs(model: Path | str, out: Path, **changes: str) -> FinetuneInputs:
    values = {"data": "digits", "device": "cpu", "ranges": "uniform:2", **changes}
    return FinetuneInputs(model=str(model), out=out, **values)


def directives(script: str) -> list[str]:
    lines = script.splitlines()
    return [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]


def test_the_script_is_one_job_array(tiny: Path, tmp_path: Path) -> None:
    pairs = (("partition", "gpu"), ("account", "lab"))
    options = ExecutorOptions(executor="slurm", sbatch=pairs, time_limit=5400.0)
    result = plan(inputs(tiny, tmp_path / "e"), FAST, options).run()
    path = tmp_path / "e" / "slurm" / "finetune.sbatch"
    assert result.lines() == [f"script  {path}", f"submit  sbatch {path}"]
    script = path.read_text()
    assert directives(script) == [
        "job-name=demerge-finetune",
        "array=0-1",
        "time=90",
        "signal=B:USR1@120",
        "open-mode=append",
        f"output={path.parent}/%A_%a.log",
        "partition=gpu",
        "account=lab",
        "requeue",
    ]
    assert "ranges=(0000-0500 0500-1000)" in script
    assert result.plan.finished_steps == 0


def test_a_job_asks_for_one_gpu_unless_another_request_is_there() -> None:
    task = Task(SPANS[0], inputs("m", Path("/e")), FAST, 2)
    for device, pairs, request in (
        ("auto", (), ["gpus-per-node=1"]),
        ("cpu", (), []),
        ("auto", (("gres", "gpu:a100:1"),), ["gres=gpu:a100:1"]),
    ):
        executor = SlurmExecutor(ExecutorOptions(executor="slurm", sbatch=pairs), device)
        lines = directives(executor.script([task], Path("/e/slurm/finetune.yaml")))
        assert [line for line in lines if line.startswith("g")] == request


def run_script(
    path: Path, index: int, tools: Path, log: Path, **environment: str
) -> subprocess.Popen[bytes]:
    """Run the script as Slurm does, with a scontrol that notes how it is called."""
    tools.mkdir(exist_ok=True)
    scontrol = tools / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" >> "$NOTES"\n')
    scontrol.chmod(0o755)
    variables = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "NOTES": str(tools / "notes"),
        "SLURM_ARRAY_TASK_ID": str(index),
        "SLURM_JOB_ID": "4711",
        **environment,
    }
    with log.open("ab") as stream:
        return subprocess.Popen(
            ["bash", os.fsencode(path)],
            env={**os.environ, **variables},
            stdout=stream,
            stderr=stream,
        )


def test_hostile_paths_are_quoted(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / HOSTILE
    folder.mkdir()
    (folder / HOSTILE).symlink_to(tiny)
    monkeypatch.chdir(folder)
    result = plan(
        inputs(HOSTILE, Path(HOSTILE + "e")), FAST, ExecutorOptions(executor="slurm")
    ).run()
    path = folder / (HOSTILE + "e") / "slurm" / "finetune.sbatch"
    assert shlex.split(result.lines()[1])[1:] == ["sbatch", str(path)]
    assert not [line for line in directives(path.read_text()) if line.startswith("output")]
    monkeypatch.chdir(tmp_path)
    process = run_script(path, 1, tmp_path / "tools", tmp_path / "log")
    assert process.wait(240) == 0, (tmp_path / "log").read_text()
    assert (folder / (HOSTILE + "e") / "0500-1000" / "expert.json").is_file()
    assert {p.name for p in folder.iterdir()} == {HOSTILE, HOSTILE + "e"}
    assert {p.name for p in tmp_path.iterdir()} == {HOSTILE, "tools", "log"}


SAVES = 'trap "sleep 0.3; touch saved; exit 75" USR1; touch begun; while :; do sleep 0.05; done'


@pytest.mark.parametrize(("restarts", "requeued"), [("0", "requeue 4711\n"), ("5", "")])
def test_a_job_saves_and_is_queued_again(
    tmp_path: Path, monkeypatch, restarts: str, requeued: str
) -> None:
    """The script waits for the child, which saves after the signal, and keeps its exit code."""
    work, tools, log = tmp_path / "work", tmp_path / "tools", tmp_path / "log"
    work.mkdir()
    monkeypatch.chdir(work)
    command = ["bash", "-c", SAVES]
    monkeypatch.setattr("demerge.finetuning.executors.slurm.command_of", lambda config: command)
    task = Task(SPANS[0], inputs("m", work / "e"), FAST, 2)
    SlurmExecutor(ExecutorOptions(executor="slurm"), "cpu").run([task], silent)
    path = work / "e" / "slurm" / "finetune.sbatch"
    process = run_script(path, 0, tools, log, SLURM_RESTART_COUNT=restarts)
    deadline = time.monotonic() + 60
    while not (work / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)  # to the shell alone, as B: in --signal says
    assert process.wait(60) == 75, log.read_text()
    assert (work / "saved").exists()
    notes = tools / "notes"
    assert (notes.read_text() if notes.exists() else "") == requeued


def test_submission_needs_slurm(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UsageError, match="needs sbatch"):
        plan(
            inputs(tiny, tmp_path / "e"), FAST, ExecutorOptions(executor="slurm", submit=True)
        ).run()
    assert not (tmp_path / "e").exists()


def submitted(tiny: Path, out: Path, options: FinetuneOptions) -> list:
    """Jobs of this machine that submitit runs."""
    work = plan(inputs(tiny, out), options, ExecutorOptions(executor="slurm", submit=True))
    executor = SlurmExecutor(work.executor.options, "cpu", cluster="local")
    from demerge.finetuning.executors.tasks import write_config

    return executor._submit(work.tasks, write_config(out.absolute() / "slurm", work.tasks[0]))


@pytest.mark.slow
def test_submitit_runs_the_jobs(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    assert [job.result() for job in submitted(tiny, tmp_path / "e", FAST)] == [0, 0]
    assert all((tmp_path / "e" / str(span) / "expert.json").is_file() for span in SPANS)


@pytest.mark.slow
def test_submitit_saves_before_it_queues_again(tiny: Path, tmp_path: Path) -> None:
    """A job that gets the signal saves, and runs again from there."""
    pytest.importorskip("submitit")
    options = FinetuneOptions(
        max_train_steps=200, train_batch_size=2, logging_steps=1, checkpointing_steps=100_000
    )
    out = tmp_path / "e"
    jobs = submitted(tiny, out, options)
    states = [out / "state" / str(span) for span in SPANS]
    deadline = time.monotonic() + 240
    while not all((s / "log.jsonl").exists() for s in states) and time.monotonic() < deadline:
        time.sleep(0.05)
    (worker,) = psutil.Process(int(jobs[0].job_id)).children()
    worker.send_signal(signal.SIGUSR2)  # as Slurm does
    assert [job.result() for job in jobs] == [0, 0]
    assert "demerge: stopped at step" in jobs[0].stderr()
