"""`demerge coefficients`: weights for a merge, in closed form, from how the base's outputs answer to its experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Device, Json, Seed, emit, progress, say

SAMPLES, SOLUTION = "Samples", "Solution"


def coefficients(
    base: Annotated[str, typer.Argument(help="Pipeline folder or Hub id.", show_default=False)],
    experts: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPERT...",
            help="Models finetuned from the base, or LoRA files of it.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option("--data", help="Image folder, CIFAR-10 batches, idx, npz, digits or hf:NAME."),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="A new .json file, for `demerge merge --weights`.")
    ],
    per: Annotated[
        str,
        typer.Option(
            help="model, block or layer: what has weights of its own.", rich_help_panel=SOLUTION
        ),
    ] = "model",
    ridge: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How much weights are shrunk towards 0; chosen by cross-fit by default.",
            rich_help_panel=SOLUTION,
        ),
    ] = None,
    relative: Annotated[
        bool,
        typer.Option(
            "--relative",
            help="Count each range's loss relative to the base's; else small timesteps decide nearly alone.",
            rich_help_panel=SOLUTION,
        ),
    ] = False,
    step: Annotated[
        float,
        typer.Option(
            help="Part of a task vector over which its effect is measured; near the weights to come is best.",
            rich_help_panel=SOLUTION,
        ),
    ] = 1.0,
    ranges: Annotated[
        str | None,
        typer.Option(
            help="uniform:N, joint or a partition.json; the experts' own by default.",
            rich_help_panel=SAMPLES,
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=1,
            help="Samples per range, each with a timestep and noise.",
            rich_help_panel=SAMPLES,
        ),
    ] = 512,
    groups: Annotated[
        int,
        typer.Option(
            min=5,
            help="Groups of images; errors come from their differences.",
            rich_help_panel=SAMPLES,
        ),
    ] = 16,
    split: Annotated[
        str,
        typer.Option(
            help="train, test or all; those of test should not judge the merge after.",
            rich_help_panel=SAMPLES,
        ),
    ] = "train",
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find the weights of a merge by least squares on the loss of all ranges, and predict what they change.

    demerge coefficients base expert-0 expert-1 --data D --per block -o weights.json
    demerge merge base expert-0 expert-1 --weights weights.json -o merged
    """
    from demerge.analysis.stages.coefficients import document, lines, prepare
    from demerge.device import resolve_device
    from demerge.storage.atomic import commit_json

    plan = prepare(
        base,
        experts,
        data,
        out,
        ranges=ranges,
        per=per,
        samples=samples,
        groups=groups,
        ridge=ridge,
        relative=relative,
        step=step,
        split=split,
        skip_broken=skip_broken,
        seed=seed,
        device=resolve_device(device),
    )
    for line in plan.lines():
        say(line)
    with progress(plan.passes, "coefficients") as bar:
        made = plan.run(bar)
    for line in lines(made):
        say(line)
    said = document(made, plan.record())
    commit_json(out, said)
    emit({"out": str(out), **said}, out, json)
