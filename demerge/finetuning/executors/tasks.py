"""One task is the finetune of one range: any process may run it, and a second run finds it done.

An unfinished task is continued from its newest checkpoint in OUT, which all processes must see.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from demerge.errors import DemergeError, Preempted, UsageError
from demerge.expert import BASE, EXPERT
from demerge.finetuning.executors.options import ExecutorOptions
from demerge.finetuning.options import FinetuneInputs, FinetuneOptions
from demerge.finetuning.train import Stop, never
from demerge.options import config_of
from demerge.progress import Progress
from demerge.storage.atomic import commit_bytes
from demerge.storage.lock import FolderInUse
from demerge.timesteps import TimestepRange

TAIL = 4096  # bytes of a log that are read
CONFIG = "finetune.yaml"
LOCK_SECONDS = 2.0  # between two looks at a lock


@dataclass(frozen=True, slots=True)
class Task:
    """The finetune of one range.

    Attributes:
        inputs, options: those of the whole finetune, as the user wrote them.
        steps: the number of steps of the range.
    """

    span: TimestepRange
    inputs: FinetuneInputs
    options: FinetuneOptions
    steps: int

    def is_finished(self) -> bool:
        """Whether the expert is in OUT."""
        folder = self.inputs.out / str(self.span)
        return (folder / EXPERT).is_file() or (folder / BASE).is_file()

    def steps_done(self) -> int:
        """Return the number of steps that the log in OUT has reached."""
        if self.is_finished():
            return self.steps
        log = self.inputs.out / "state" / str(self.span) / "log.jsonl"
        for line in reversed(read_tail(log).splitlines()):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue  # the log may end in half a line, and its tail begin with one
        return 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended: the exit code that `demerge finetune` has, and the message."""

    span: TimestepRange
    code: int = 0
    message: str = ""


class TasksFailed(DemergeError):
    """Some tasks of a finetune failed; it ends with the exit code of the first."""

    def __init__(self, what: str, *, fix: str = "", exit_code: int = 1) -> None:
        super().__init__(what, fix=fix)
        self.exit_code = exit_code


class Executor(Protocol):
    """Runs tasks."""

    def describe(self, count: int) -> str:
        """Return in a line who runs this number of tasks."""

    def run(self, tasks: Sequence[Task], progress: Progress, stop: Stop = never) -> list[str]:
        """Run the tasks; return lines for the person.

        Raises:
            TasksFailed: if some failed. The others were run.
            Preempted: if `stop` returned true; the same call continues.
        """


def run_task(task: Task, stop: Stop = never, patience: float = 0.0) -> Outcome:
    """Run a task in this process.

    Args:
        patience: seconds to wait for a process that trains the same range and is about to end.
    """
    from demerge.finetuning.planning import plan

    inputs = replace(task.inputs, only=(str(task.span),))
    deadline = time.monotonic() + patience
    while True:
        try:
            planned = plan(inputs, task.options, ExecutorOptions(num_workers=1))
            replace(planned, stop=stop).run()
        except FolderInUse as error:
            if time.monotonic() > deadline or stop():
                return Outcome(task.span, error.exit_code, in_one_line(str(error)))
            time.sleep(LOCK_SECONDS)
        except DemergeError as error:
            return Outcome(task.span, error.exit_code, in_one_line(str(error)))
        else:
            return Outcome(task.span)


def settle(outcomes: Sequence[Outcome], count: int) -> None:
    """Raise the error of `count` tasks that ended so, if any did not finish.

    Raises:
        TasksFailed, Preempted: as `Executor.run` does.
    """
    failed = [o for o in outcomes if o.code not in (0, Preempted.exit_code)]
    if failed:
        texts = [f"{o.span} (exit code {o.code}): {o.message}" for o in failed]
        what = f"{len(failed)} of {count} experts failed: {'; '.join(texts)}"
        fix = "remove the cause and run the same command again; finished experts stay"
        raise TasksFailed(what, fix=fix, exit_code=failed[0].code)
    finished = sum(o.code == 0 for o in outcomes)
    if finished < count:
        what = f"stopped: {count - finished} of {count} experts are not finished"
        raise Preempted(what, fix="run the same command again to continue")


def report(tasks: Sequence[Task], progress: Progress) -> None:
    """Report the steps of all tasks, as their logs show them."""
    done = [task.steps_done() for task in tasks]
    finished = sum(steps == task.steps for steps, task in zip(done, tasks, strict=True))
    total = sum(task.steps for task in tasks)
    progress(sum(done), total, f"{finished} of {len(tasks)} experts finished")


def write_config(folder: Path, task: Task) -> Path:
    """Write the options that all tasks share as a file for `demerge finetune --config`."""
    import yaml

    values = config_of(replace(task.inputs, only=()), task.options)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False)
    return commit_bytes(folder.absolute() / CONFIG, text.encode())


def command_of(config: Path) -> list[str]:
    """Return the command that runs a task in a process of its own; the range is to follow."""
    program = [sys.executable, "-m", "demerge.cli.main", "finetune"]
    return [*program, "--config", str(config), "--num-workers", "1", "--only"]


def in_one_line(message: str) -> str:
    """Return an error and what mends it in one line."""
    return " ".join(message.replace("\n  fix: ", "; fix: ").split())


def read_tail(path: Path) -> str:
    """Return the end of a log; empty if there is none."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - TAIL))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def import_package(name: str, executor: str) -> Any:
    """Return a package of the extra `cluster`.

    Raises:
        UsageError: if it is not installed, with what to install.
    """
    try:
        package: ModuleType = importlib.import_module(name)
    except ImportError as error:
        what = f"--executor {executor} needs the package {name}, which cannot be imported: {error}"
        raise UsageError(what, fix="pip install 'demerge[cluster]'") from error
    return package
