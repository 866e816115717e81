"""Tasks on a Ray cluster: https://docs.ray.io/en/latest/ray-core/fault-tolerance.html.

A task whose node fails starts again on another one and continues from the newest checkpoint in OUT.
So OUT, the base and the data must lie in folders that all nodes share, under the same paths.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from demerge.errors import Preempted, UsageError
from demerge.finetuning.executors.tasks import (
    Outcome,
    Task,
    import_package,
    report,
    run_task,
    settle,
)
from demerge.finetuning.train import Stop, never
from demerge.progress import Progress

POLL_SECONDS = 1.0
PATIENCE = 120.0  # seconds for a process of a lost node to end: it holds the lock of its range
SAVE_SECONDS = 300.0  # for tasks that were told to stop


@dataclass(frozen=True, slots=True)
class RayExecutor:
    """Runs tasks on the cluster of RAY_ADDRESS or of this machine; without one, starts one here.

    Attributes:
        retries: how often a task starts again whose node failed.
        device: where a task computes; a GPU each, if the cluster has some and it is not `cpu`.
    """

    retries: int
    device: str
    ray: Any = field(default_factory=lambda: import_package("ray", "ray"))

    def describe(self, count: int) -> str:
        """Return in a line who runs this number of tasks."""
        return f"{count} on a Ray cluster, whose nodes must share the output folder"

    def run(self, tasks: Sequence[Task], progress: Progress, stop: Stop = never) -> list[str]:
        """Run the tasks.

        Raises:
            TasksFailed, Preempted: as `Executor.run` does.
        """
        is_ours = not self.ray.is_initialized()
        if is_ours:
            self._connect()
        try:
            settle(self._run(tasks, progress, stop), len(tasks))
        finally:
            if is_ours:
                self.ray.shutdown()
        return []

    def _connect(self) -> None:
        """Connect to the cluster; the handler of SIGTERM stays, which Ray would replace."""
        before = signal.getsignal(signal.SIGTERM)
        try:
            self.ray.init(log_to_driver=False)
        except ConnectionError as error:
            fix = "start a cluster with ray start --head, and set RAY_ADDRESS"
            raise UsageError(f"no Ray cluster answers: {error}", fix=fix) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)

    def _run(self, tasks: Sequence[Task], progress: Progress, stop: Stop) -> list[Outcome]:
        has_gpus = self.device != "cpu" and self.ray.cluster_resources().get("GPU", 0) >= 1
        remote = self.ray.remote(num_gpus=int(has_gpus), max_retries=self.retries)(run_on_node)
        folder = os.getcwd()
        running = {
            remote.options(name=f"finetune {task.span}").remote(task, folder): task
            for task in tasks
        }
        outcomes: list[Outcome] = []
        deadline: float | None = None
        while running and (deadline is None or time.monotonic() < deadline):
            ready, _ = self.ray.wait(list(running), timeout=POLL_SECONDS)
            outcomes += [self._outcome(reference, running.pop(reference)) for reference in ready]
            report(tasks, progress)
            if deadline is None and stop():
                deadline = time.monotonic() + SAVE_SECONDS
                for reference in running:
                    self.ray.cancel(reference)
        return outcomes

    def _outcome(self, reference: Any, task: Task) -> Outcome:
        """Return how a task ended."""
        errors = self.ray.exceptions
        try:
            outcome: Outcome = self.ray.get(reference)
        except errors.TaskCancelledError:
            return Outcome(task.span, Preempted.exit_code)
        except errors.RayTaskError as error:
            return Outcome(task.span, 1, f"a bug in demerge: {error}")
        except errors.RayError as error:
            what = f"Ray gave up after {self.retries} retries: {error}"
            return Outcome(task.span, 4, " ".join(what.split()))
        if outcome.code == 0 and not task.is_finished():
            what = f"a node finished it, but it is not in {task.inputs.out}, which nodes must share"
            return Outcome(task.span, 2, what)
        return outcome


def run_on_node(task: Task, folder: str) -> Outcome:
    """Run a task on a node, in the folder that the command was started in."""
    try:
        os.chdir(folder)
    except OSError as error:
        what = f"a node has no folder {folder}, which all nodes must share: {error.strerror}"
        return Outcome(task.span, 2, what)
    with _cancellation() as stop:
        return run_task(task, stop, PATIENCE)


@contextlib.contextmanager
def _cancellation() -> Iterator[Callable[[], bool]]:
    """Catch what `ray.cancel` sends; the value is a function that returns whether it came."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield never
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
