"""`demerge finetune`: one expert per range, the joint control, or a base from a random start."""

from __future__ import annotations

from dataclasses import replace

from demerge.cli.common import DryRun, Json, execute, preview, say, stop_signals
from demerge.cli.options import from_options
from demerge.finetuning.executors.options import ExecutorOptions
from demerge.finetuning.options import FinetuneInputs, FinetuneOptions


@from_options
def finetune(
    inputs: FinetuneInputs,
    options: FinetuneOptions,
    execution: ExecutorOptions,
    *,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Finetune one expert per range of timesteps. Run the command again to resume.

    Each expert is a stock pipeline folder OUT/0000-0250 with expert.json and log.jsonl. Under
    `accelerate launch` or `torchrun` the processes share each step. With several GPUs and without
    a launcher, each GPU trains an expert of its own.
    """
    from demerge.finetuning import plan

    planned = plan(inputs, options, execution, tell=say)
    with stop_signals() as stop:
        if dry_run:
            preview(planned, json=json)
        elif planned.is_main:
            execute(replace(planned, stop=stop), "finetune", out=planned.out, json=json)
        else:
            replace(planned, stop=stop).run()
