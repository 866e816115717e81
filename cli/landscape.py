"""`demerge landscape`: how long and how alike the task vectors of experts are, and the loss around their base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Device, Json, Seed, emit, progress, say

SAMPLES, POINTS = "Samples", "Points"


def landscape(
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
        Path | None,
        typer.Option(
            "-o", "--out", help="A new folder, which gets landscape.json, tables and plots."
        ),
    ] = None,
    merged: Annotated[
        str | None,
        typer.Option(
            help="A merged model that the path leads to, in place of one to each expert.",
            rich_help_panel=POINTS,
        ),
    ] = None,
    plane: Annotated[
        str,
        typer.Option(
            help="Experts of the plane by their places from 0 on, as 0,3; auto takes the two that agree least; none.",
            rich_help_panel=POINTS,
        ),
    ] = "auto",
    points: Annotated[
        int,
        typer.Option(
            min=1,
            help="Steps from the base to an expert, on paths and plane.",
            rich_help_panel=POINTS,
        ),
    ] = 4,
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
            min=16,
            help="Samples per range and point, the same at all points.",
            rich_help_panel=SAMPLES,
        ),
    ] = 128,
    split: Annotated[
        str,
        typer.Option(
            help="test, train or all; a tenth is test where the data has no such split.",
            rich_help_panel=SAMPLES,
        ),
    ] = "test",
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Compare the task vectors of experts, and measure the loss of each range on the way to them and between two of them.

    demerge landscape base expert-0 expert-1 --data D --merged merged -o landscape
    """
    from demerge.analysis.stages.landscape import document, lines, prepare, write
    from demerge.device import resolve_device

    plan = prepare(
        base,
        experts,
        data,
        out,
        merged=merged,
        ranges=ranges,
        plane=plane,
        points=points,
        samples=samples,
        split=split,
        skip_broken=skip_broken,
        seed=seed,
        device=resolve_device(device),
    )
    for line in plan.lines():
        say(line)
    with progress(plan.points_measured, "landscape") as bar:
        found = plan.run(bar)
    for line in lines(found):
        say(line)
    made = document(found, plan.record())
    files = [] if out is None else write(found, made, out)
    emit({"out": out, "files": files, **made}, out, json)
