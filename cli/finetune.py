"""`demerge finetune`: one expert per range, the joint control, or a base from a random start."""

from __future__ import annotations

from demerge.cli.common import DryRun, Json, emit, progress, say, stop_signals
from demerge.cli.options import from_options
from demerge.finetuning.options import FinetuneInputs, FinetuneOptions


@from_options
def finetune(
    inputs: FinetuneInputs, options: FinetuneOptions, *, dry_run: DryRun = False, json: Json = False
) -> None:
    """Finetune one expert per range of timesteps. Run the command again to resume.

    Each expert is a stock pipeline folder OUT/0000-0250 with expert.json and log.jsonl.
    """
    from demerge.finetuning import finetune as train
    from demerge.finetuning.planning import plan as planned
    from demerge.finetuning.train import check

    plan = planned(inputs, options)
    for line in plan.lines():
        say(line)
    if dry_run:
        check(plan.base, plan.data, plan.ranges, plan.options, plan.out, layers=plan.layers)
        emit(plan.document(), None, json)
        return
    with stop_signals() as stop, progress(plan.total_steps, "finetune") as bar:
        done = plan.finished_steps
        for step in train(
            plan.base, plan.data, plan.ranges, plan.options, plan.out, layers=plan.layers, stop=stop
        ):
            bar(done + step.step, plan.total_steps, f"{step.range} loss {step.loss:.4f}")
            done += step.total if step.step == step.total else 0
    emit(plan.document(), plan.out, json)
