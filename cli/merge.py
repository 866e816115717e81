"""`demerge merge`: a base and its experts into one model."""

from __future__ import annotations

import typer

from demerge.cli.common import DryRun, Json, emit, execute, progress, say
from demerge.cli.options import from_options, stated
from demerge.errors import UsageError
from demerge.merging.options import MergeInputs, MergeOptions


@from_options(record=False)
def merge(
    context: typer.Context,
    inputs: MergeInputs,
    options: MergeOptions,
    *,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Merge experts into one model of the base's architecture.

    A pipeline folder in gives a pipeline folder out. It loads with stock diffusers and holds the
    recipe:

        demerge merge base expert-0 expert-1 -o merged --method ties --option density=0.2
    """
    from demerge.device import resolve_device
    from demerge.merging import Recipe, verify
    from demerge.merging import plan as plan_merge

    changes = stated(context, options)
    inputs.check_verify(changes, dry_run=dry_run)
    if inputs.recipe is None:
        recipe = Recipe.of(inputs.base or "", inputs.experts, ranges=inputs.ranges, **changes)
    else:
        recipe = Recipe.read(inputs.recipe).changed(ranges=inputs.ranges, **changes)
    device, out, report = resolve_device(inputs.device), inputs.out, inputs.report_dir
    if inputs.verify:
        with progress(1, "verify") as bar:
            workers = inputs.num_workers
            verified = verify(
                inputs.recipe or "", recipe, out, device=device, num_workers=workers, progress=bar
            )
        say(*verified.lines())
        emit(verified.document(), None, json)
        return
    if out is None and not dry_run:
        raise UsageError("no output is named", fix="give -o OUT, or --dry-run")
    if dry_run and (inputs.report or report):
        what = "--dry-run writes nothing, and --report writes"
        raise UsageError(what, fix="leave one of them out")
    plan = plan_merge(
        recipe, out, report=report or inputs.report, device=device, num_workers=inputs.num_workers
    )
    if not dry_run:
        execute(plan, "merge", out=out, json=json)
        return
    say(*plan.describe())
    with progress(plan.cost().steps, "merge") as bar:
        survey = plan.measure(bar)
    say(*survey.lines())
    emit(survey.document(), None, json)
