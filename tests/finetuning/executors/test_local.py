"""Several experts at the same time on one machine: the same bytes, named failures, one stop signal.

By default the processes are forks of this one, since a new one imports torch. `test_slurm.py` runs the
command of a task in a process of its own, and so do the slow tests here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

from demerge.cli.main import main
from demerge.errors import Preempted
from demerge.finetuning import FinetuneInputs, FinetuneOptions, plan
from demerge.finetuning.executors.local import LocalExecutor, visible_gpus
from demerge.finetuning.executors.options import ExecutorOptions
from demerge.finetuning.executors.tasks import TasksFailed
from demerge.storage.atomic import sha256

FAST = FinetuneOptions(max_train_steps=3, train_batch_size=2, logging_steps=1)
TWO = ExecutorOptions(num_workers=2)


class Forked(ForkProcess):
    """Runs a command of demerge as `subprocess.Popen` does, in a fork of this process."""

    def __init__(
        self, command: Sequence[str], *, stdout: IO[bytes], env: Mapping[str, str], **_: object
    ) -> None:
        super().__init__(target=self.work, args=(command, stdout.fileno(), env))
        self.start()

    @staticmethod
    def work(command: Sequence[str], log: int, environment: Mapping[str, str]) -> None:
        os.setsid()
        for number in (1, 2):
            os.dup2(log, number)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        os.environ |= environment
        sys.argv = command[command.index("demerge.cli.main") :]
        main()

    def poll(self) -> int | None:
        return self.exitcode

    @property
    def returncode(self) -> int | None:
        return self.exitcode

    wait = ForkProcess.join


@pytest.fixture(params=["forked", pytest.param("new", marks=pytest.mark.slow)])
def processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor forks this process, or starts new ones."""
    if request.param == "forked":
        forking = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})
        monkeypatch.setattr("demerge.finetuning.executors.local.subprocess", forking)


def inputs(model: Path, out: Path, ranges: str = "uniform:2") -> FinetuneInputs:
    return FinetuneInputs(model=str(model), out=out, data="digits", device="cpu", ranges=ranges)


def content(out: Path) -> dict[str, str]:
    """The files of the experts in a folder, by their hashes."""
    files = [path for path in out.glob("*-*/**/*") if path.is_file()]
    return {str(path.relative_to(out)): sha256(path) for path in files}


@pytest.mark.usefixtures("processes")
def test_two_processes_write_the_bytes_of_one(tiny: Path, tmp_path: Path) -> None:
    plan(inputs(tiny, tmp_path / "one"), FAST).run()
    planned = plan(inputs(tiny, tmp_path / "two"), FAST, TWO)
    assert isinstance(planned.executor, LocalExecutor)
    assert "tasks   2 processes at the same time" in planned.describe()
    seen: list[tuple[int, int]] = []
    result = planned.run(lambda done, total, text="": seen.append((done, total)))
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert (seen[-1], result.plan.finished_steps) == ((6, 6), 6)
    logs = sorted((tmp_path / "two" / "local").glob("*.log"))
    assert [log.stem for log in logs] == ["0000-0500", "0500-1000"]
    assert all("ranges" in log.read_text() for log in logs)
    again = plan(inputs(tiny, tmp_path / "two"), FAST, TWO)
    assert (again.executor, again.tasks) == (None, ())
    assert again.run().plan.finished_steps == 6


FAILS_ONCE = """
import pathlib, sys
out, span = pathlib.Path(sys.argv[1]), sys.argv[2]
if span == "0000-0333":
    print("demerge: no such data\\n  fix: look for it", file=sys.stderr)
    sys.exit(3)
(out / span).mkdir()
(out / span / "expert.json").write_text("{}")
"""


def test_a_failure_is_named_and_the_others_go_on(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "e"
    command = [sys.executable, "-S", "-c", FAILS_ONCE, str(out)]
    monkeypatch.setattr("demerge.finetuning.executors.local.command_of", lambda config: command)
    planned = plan(inputs(tiny, out, "uniform:3"), FAST, TWO)
    names = [str(task.span) for task in planned.tasks]
    assert names[0] == "0000-0333"
    with pytest.raises(TasksFailed) as failed:
        planned.run()
    assert failed.value.exit_code == 3
    end = f"no such data; fix: look for it (see {out}/local/0000-0333.log)"
    assert failed.value.what == f"1 of 3 experts failed: 0000-0333 (exit code 3): {end}"
    assert all((out / name / "expert.json").is_file() for name in names[1:])


def test_a_killed_process_is_a_failure(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    kill = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr("demerge.finetuning.executors.local.command_of", lambda config: kill)
    with pytest.raises(TasksFailed, match="ended by signal 9") as failed:
        plan(inputs(tiny, tmp_path / "e"), FAST, TWO).run()
    assert failed.value.exit_code == 137


@pytest.mark.usefixtures("processes")
def test_a_stop_signal_reaches_each_process_once(tiny: Path, tmp_path: Path) -> None:
    out, long = tmp_path / "e", replace(FAST, max_train_steps=100_000)
    logs = [out / "state" / name / "log.jsonl" for name in ("0000-0500", "0500-1000")]
    planned = plan(inputs(tiny, out), long, TWO)
    with pytest.raises(Preempted, match="2 of 2 experts are not finished"):
        replace(planned, stop=lambda: all(log.exists() for log in logs)).run()
    for name in ("0000-0500", "0500-1000"):
        assert "stopping after this step" in (out / "local" / f"{name}.log").read_text()
        assert list((out / "state" / name).glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_end_the_command_with_their_codes(
    tiny: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    words = ["--data", "digits", "--device", "cpu", "--ranges", "uniform:2", "--num-workers", "2"]
    words += ["--logging-steps", "1", "--max-train-steps", "100000", "--train-batch-size", "2"]
    command = [sys.executable, "-m", "demerge.cli.main", "finetune", str(tiny), *words]
    out = tmp_path / "e"
    process = subprocess.Popen([*command, "-o", str(out)], stderr=subprocess.PIPE, text=True)
    logs = [out / "state" / name / "log.jsonl" for name in ("0000-0500", "0500-1000")]
    deadline = time.monotonic() + 240
    while not all(log.exists() for log in logs) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=240)
    assert (process.returncode, "2 of 2 experts are not finished" in err) == (code, True)
    assert all(list(log.parent.glob("step-*")) for log in logs)


def test_each_process_gets_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus("auto") == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-ab")
    assert visible_gpus("cuda") == ("3", "GPU-ab")
    assert visible_gpus("cuda:1") == visible_gpus("cpu") == ()
    executor = LocalExecutor(2, ("3", "GPU-ab"))
    assert executor.describe(4) == "2 processes at the same time, on the GPUs 3,GPU-ab"


@pytest.mark.gpu
def test_experts_on_two_gpus(tiny: Path, tmp_path: Path) -> None:
    if len(visible_gpus("auto")) < 2:
        pytest.skip("needs two GPUs")
    planned = plan(replace(inputs(tiny, tmp_path / "e"), device="auto"), FAST)
    assert isinstance(planned.executor, LocalExecutor)
    assert planned.run().plan.finished_steps == 6
