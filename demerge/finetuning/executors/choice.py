"""Which executor a command gets."""

from __future__ import annotations

from demerge.errors import UsageError
from demerge.finetuning.executors.local import LocalExecutor, visible_gpus
from demerge.finetuning.executors.options import ExecutorOptions
from demerge.finetuning.executors.ray import RayExecutor
from demerge.finetuning.executors.slurm import SlurmExecutor
from demerge.finetuning.executors.tasks import Executor
from demerge.parallel import launched_processes


def choose(options: ExecutorOptions, device: str) -> Executor | None:
    """Return the executor; None if this process trains the ranges one after the other.

    Raises:
        UsageError: if a launcher started this process and others to share each step, or if a
            package is missing.
    """
    workers = options.num_workers
    if launched_processes() > 1:
        if options.executor == "local" and workers in (None, 1):
            return None
        name = "--num-workers" if options.executor == "local" else f"--executor {options.executor}"
        what = f"{name} cannot be used under torchrun or accelerate launch"
        raise UsageError(what, fix="leave it out, or run demerge finetune without the launcher")
    if options.executor == "ray":
        return RayExecutor(options.retries, device)
    if options.executor == "slurm":
        return SlurmExecutor(options, device)
    gpus = () if workers == 1 else visible_gpus(device)
    workers = workers or len(gpus)
    return LocalExecutor(workers, gpus) if workers > 1 else None
