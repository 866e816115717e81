"""Tasks as one job array of Slurm.

OUT/slurm/finetune.yaml     the options of every job
OUT/slurm/finetune.sbatch   the job array: `sbatch OUT/slurm/finetune.sbatch`

A job that gets its signal 120 s before its time ends saves and is queued again. With `--submit` the
jobs go through submitit, which keeps its files in the same folder.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demerge.errors import ResourceError, UsageError
from demerge.finetuning.executors.options import ExecutorOptions
from demerge.finetuning.executors.tasks import Task, command_of, import_package, write_config
from demerge.finetuning.train import Stop, never
from demerge.progress import Progress
from demerge.storage.atomic import commit_bytes

SAVE_SECONDS = 120  # from the signal to the end of the job
POLL_SECONDS = 0.2
NAME = "demerge-finetune"
# Slurm sends the signal of submitit, SIGUSR2, to all processes of a job; the child gets SIGUSR1
SHIELD = ("/bin/sh", "-c", "trap '' USR2; exec \"$@\"", "sh")

SCRIPT = """\
#!/bin/bash
{directives}

# One job trains one range. Run again, it continues; finished, it ends at once.
set -u
cd -- {folder} || exit 2
ranges=({ranges})
{command} "${{ranges[$SLURM_ARRAY_TASK_ID]}}" &
child=$!
again=no
trap 'again=yes; kill -USR1 "$child"' USR1  # the time is nearly over
trap 'kill -USR1 "$child"' TERM
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do  # a signal ends `wait` before the child has saved
    wait "$child"
    code=$?
done
if [ "$again" = yes ] && [ "$code" = 75 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {retries} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass(frozen=True, slots=True)
class SlurmExecutor:
    """Writes a job array, and submits it if that was asked for; it does not wait for the jobs.

    Attributes:
        device: where a job computes; it gets one GPU unless this is `cpu`.
        cluster: what submitit runs the jobs on; "local" is processes of this machine.
    """

    options: ExecutorOptions
    device: str
    cluster: str = "slurm"
    submitit: Any = field(default=None)

    def __post_init__(self) -> None:
        if self.options.submit and self.submitit is None:
            object.__setattr__(self, "submitit", import_package("submitit", "slurm --submit"))

    def describe(self, count: int) -> str:
        """Return in a line who runs this number of tasks."""
        what = "submitted" if self.options.submit else "written, not submitted"
        return f"{count} jobs of a Slurm array, {what}"

    def run(self, tasks: Sequence[Task], progress: Progress, stop: Stop = never) -> list[str]:
        """Write the job array and submit it if that was asked for; return what to do next.

        Raises:
            UsageError: if the jobs are to be submitted and this machine has no Slurm.
            ResourceError: if Slurm refuses them.
        """
        if self.options.submit and self.cluster == "slurm" and shutil.which("sbatch") is None:
            fix = "submit on a login node of the cluster, or leave out --submit to write the script"
            raise UsageError("--submit needs sbatch, which this machine has not", fix=fix)
        folder = tasks[0].inputs.out.absolute() / "slurm"
        config = write_config(folder, tasks[0])
        path = folder / "finetune.sbatch"
        script = self.script(tasks, config)
        commit_bytes(path, os.fsencode(script))
        command = f"sbatch {shlex.quote(str(path))}"
        if not self.options.submit:
            return [f"script  {path}", f"submit  {command}"]
        jobs = self._submit(tasks, config)
        return [f"script  {path}", f"jobs    {' '.join(job.job_id for job in jobs)}"]

    def directives(self, count: int, folder: Path) -> dict[str, str]:
        """Return the options of sbatch for a number of jobs."""
        own = dict(self.options.sbatch)
        values = {
            "job-name": NAME,
            "array": f"0-{count - 1}",
            "time": str(self._minutes()),
            "signal": f"B:USR1@{SAVE_SECONDS}",
            "open-mode": "append",
        }
        if re.fullmatch(r"[\w./+=:@,-]+", str(folder)):  # else Slurm's default, in its own folder
            values["output"] = f"{folder}/%A_%a.log"
        return values | self._gpu() | own

    def script(self, tasks: Sequence[Task], config: Path) -> str:
        """Return the job array as a script for sbatch."""
        values = self.directives(len(tasks), config.parent)
        lines = [f"#SBATCH --{name}={value}" for name, value in values.items()]
        return SCRIPT.format(
            directives="\n".join([*lines, "#SBATCH --requeue"]),
            folder=shlex.quote(os.getcwd()),
            ranges=" ".join(str(task.span) for task in tasks),
            command=shlex.join(command_of(config)),
            retries=self.options.retries,
        )

    def _submit(self, tasks: Sequence[Task], config: Path) -> list[Any]:
        """Submit the jobs through submitit; return its jobs."""
        retries = self.options.retries
        executor = self.submitit.AutoExecutor(
            config.parent, cluster=self.cluster, slurm_max_num_timeout=retries
        )
        additional = self._gpu() | dict(self.options.sbatch)
        executor.update_parameters(
            name=NAME,
            timeout_min=self._minutes(),
            slurm_signal_delay_s=SAVE_SECONDS,
            slurm_additional_parameters=additional | {"requeue": True},
        )
        folder = os.getcwd()
        jobs = [ArrayJob([*command_of(config), str(task.span)], folder) for task in tasks]
        try:
            submitted: list[Any] = executor.submit_array(jobs)
        except self.submitit.core.utils.FailedJobError as error:
            fix = "check --sbatch and --time-limit"
            raise ResourceError(f"Slurm refused the jobs: {error}", fix=fix) from error
        return submitted

    def _minutes(self) -> int:
        return -int(-self.options.time_limit // 60)

    def _gpu(self) -> dict[str, str]:
        """Return the request of one GPU, unless there is one in `sbatch`."""
        has_own = any(name.startswith(("gpu", "gres")) for name, _ in self.options.sbatch)
        return {} if has_own or self.device == "cpu" else {"gpus-per-node": "1"}


class ArrayJob:
    """A task as submitit runs it: a child process that saves before the job is queued again."""

    def __init__(self, command: list[str], folder: str) -> None:
        self.command, self.folder = command, folder
        self._pid: int | None = None

    def __call__(self) -> int:
        """Run the command; return its exit code if it is 0."""
        child = subprocess.Popen([*SHIELD, *self.command], cwd=self.folder)
        self._pid = child.pid
        while child.poll() is None:  # `wait` would hold a lock that `checkpoint` needs
            time.sleep(POLL_SECONDS)
        if child.returncode != 0:
            raise RuntimeError(f"demerge finetune ended with exit code {child.returncode}")
        return 0

    def checkpoint(self) -> Any:
        """Let the child save and end; return the job that continues it."""
        from submitit.core.utils import DelayedSubmission

        if self._pid is not None:
            try:
                os.kill(self._pid, signal.SIGUSR1)
                os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
            except (ProcessLookupError, ChildProcessError):
                pass  # it ended by itself
        return DelayedSubmission(ArrayJob(self.command, self.folder))
