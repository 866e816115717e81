"""Several experts at the same time on this machine, one process each, one GPU each.

OUT/local/finetune.yaml     the options of every process
OUT/local/0000-0250.log     what the process of a range printed
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demerge.errors import Preempted
from demerge.finetuning.executors.tasks import (
    Outcome,
    Task,
    command_of,
    in_one_line,
    report,
    settle,
    write_config,
)
from demerge.finetuning.train import Stop, never
from demerge.progress import Progress
from demerge.storage.atomic import open_log

POLL_SECONDS = 0.2


def visible_gpus(device: str) -> tuple[str, ...]:
    """Return the GPUs that `auto` or `cuda` may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return ()
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    own = [name.strip() for name in names if name.strip()]
    return tuple(own[:count]) if own else tuple(map(str, range(count)))


@dataclass(frozen=True, slots=True)
class Child:
    """The process of a task; what it prints begins at byte `begin` of the log."""

    task: Task
    process: subprocess.Popen[bytes]
    log: Path
    begin: int

    def outcome(self, is_stopping: bool) -> Outcome:
        """Return how the process ended."""
        code, span = self.process.returncode, self.task.span
        if code == 0:
            return Outcome(span)
        if code == Preempted.exit_code or (is_stopping and code == -signal.SIGTERM):
            return Outcome(span, Preempted.exit_code)
        where = f" (see {self.log})"
        if code < 0:
            return Outcome(span, 128 - code, f"ended by signal {-code}{where}")
        printed = self.log.read_bytes()[self.begin :].decode(errors="replace")
        _, found, message = printed.rpartition("demerge: ")
        return Outcome(span, code, (in_one_line(message) if found else "no message") + where)


@dataclass(frozen=True, slots=True)
class LocalExecutor:
    """Runs tasks in child processes.

    Attributes:
        workers: the number of processes at the same time.
        gpus: the GPUs they are dealt; none on a CPU.
    """

    workers: int
    gpus: tuple[str, ...] = ()

    def describe(self, count: int) -> str:
        """Return in a line who runs this number of tasks."""
        on = f", on the GPUs {','.join(self.gpus)}" if self.gpus else ""
        return f"{min(count, self.workers)} processes at the same time{on}"

    def run(self, tasks: Sequence[Task], progress: Progress, stop: Stop = never) -> list[str]:
        """Run the tasks; a stop signal reaches each process once, which saves and ends.

        Raises:
            TasksFailed, Preempted: as `Executor.run` does.
        """
        folder = tasks[0].inputs.out / "local"
        config = write_config(folder, tasks[0])
        waiting, outcomes, is_stopping = list(tasks), list[Outcome](), False
        running: dict[int, Child] = {}  # by the number of the worker
        try:
            while running or (waiting and not is_stopping):
                for worker in set(range(self.workers)) - running.keys():
                    if waiting and not is_stopping:
                        running[worker] = self._start(waiting.pop(0), config, worker)
                time.sleep(POLL_SECONDS)
                if not is_stopping and stop():
                    is_stopping = True
                    for child in running.values():
                        child.process.terminate()
                for worker, child in list(running.items()):
                    if child.process.poll() is not None:
                        outcomes.append(child.outcome(is_stopping))
                        del running[worker]
                report(tasks, progress)
        finally:
            for child in running.values():  # this process was told to end at once
                child.process.kill()
                child.process.wait()
        settle(outcomes, len(tasks))
        return []

    def _start(self, task: Task, config: Path, worker: int) -> Child:
        """Start the process of a task; a terminal's Ctrl-C reaches this process alone."""
        environment = dict(os.environ)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[worker % len(self.gpus)]
        path = config.with_name(f"{task.span}.log")
        with open_log(path) as log:
            begin = log.tell()
            process = subprocess.Popen(
                [*command_of(config), str(task.span)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            return Child(task, process, path, begin)
