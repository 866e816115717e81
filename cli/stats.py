"""`demerge stats`: what merge methods that use data need to know of each expert's range."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Device, Json, Seed, emit, progress, say


def stats(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Experts, or other pipeline folders or Hub ids."),
    ],
    data: Annotated[
        str,
        typer.Option("--data", help="Image folder, CIFAR-10 batches, idx, npz, digits or hf:NAME."),
    ],
    ranges: Annotated[
        str | None,
        typer.Option(
            help="uniform:N, joint, a partition.json or START:STOP; an expert's own where none is given."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Folder that gets one folder per range; beside each expert.json where none is given.",
        ),
    ] = None,
    what: Annotated[
        str,
        typer.Option(
            "--what",
            help="fisher (E[g^2], for fisher), gram (E[x x^T], for regmean), comma-separated.",
        ),
    ] = "fisher,gram",
    samples: Annotated[
        int,
        typer.Option("--samples", min=1, help="Images per range, each with a timestep and noise."),
    ] = 256,
    split: Annotated[str, typer.Option("--split", help="train, test or all.")] = "train",
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure the Fisher and the input Gram matrices of each expert on its range, as `merge` takes them.

    The same command again does nothing; one of other options is refused where its files are.
    """
    from demerge.device import resolve_device
    from demerge.statistics import prepare

    plan = prepare(
        models,
        data,
        ranges=ranges,
        out=out,
        what=[name.strip() for name in what.split(",")],
        samples=samples,
        seed=seed,
        split=split,
        skip_broken=skip_broken,
        device=resolve_device(device),
    )
    for line in plan.lines():
        say(line)
    with progress(len(plan.jobs) * samples, "stats") as bar:
        for path in plan.run(bar):
            say(f"wrote   {path}")
    emit(plan.document(), out, json)
