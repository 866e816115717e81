"""`demerge analyze`: how the timesteps of a base conflict, and where to cut them into ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import (
    Device,
    Json,
    Seed,
    data_words,
    emit,
    progress,
    ranges_of,
    say,
)

MEASURE, CUT = "Measurement", "Cut"


def analyze(
    model: Annotated[str, typer.Argument(help="Pipeline folder or Hub id.")],
    data: Annotated[
        str,
        typer.Option("--data", help="Image folder, CIFAR-10 batches, idx, npz, digits or hf:NAME."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", help="Folder that gets conflict.safetensors, partition.json, plots."
        ),
    ],
    ranges: Annotated[
        str,
        typer.Option(
            "-n",
            "--ranges",
            help="Ranges to cut into; auto is what held-out groups support.",
            rich_help_panel=CUT,
        ),
    ] = "4",
    method: Annotated[
        str, typer.Option(help="gradient, hierarchical, uniform or logsnr.", rich_help_panel=CUT)
    ] = "gradient",
    score: Annotated[
        str,
        typer.Option(help="What gradient maximises: step, energy or cosine.", rich_help_panel=CUT),
    ] = "step",
    bins: Annotated[
        int, typer.Option(min=1, help="Bins of timesteps.", rich_help_panel=MEASURE)
    ] = 20,
    groups: Annotated[
        int | None,
        typer.Option(
            min=5,
            help="Groups of samples, whose differences give the errors: 8; with --budget or --se the most there may be: 64.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="As many groups as fit in 90s, 10m or 2h, at least 5. A map that is there is taken as it is, whatever the "
            "budget; --groups N without --budget adds to it.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    se: Annotated[
        float | None,
        typer.Option(
            help="Groups until the similarity of neighbouring bins has this median SE, such as 0.02.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    train_batch_size: Annotated[
        int,
        typer.Option(
            "--train-batch-size", min=1, help="Samples per bin and group.", rich_help_panel=MEASURE
        ),
    ] = 16,
    draws: Annotated[
        str,
        typer.Option(
            help="shared between the bins of a group, or independent.", rich_help_panel=MEASURE
        ),
    ] = "shared",
    antithetic: Annotated[
        str,
        typer.Option(
            help="Take each noise with its opposite: on, off, or auto: in bins where that helps.",
            rich_help_panel=MEASURE,
        ),
    ] = "off",
    metric: Annotated[
        str, typer.Option(help="Inner products: euclid, or adam.", rich_help_panel=MEASURE)
    ] = "euclid",
    engine: Annotated[
        str,
        typer.Option(
            help="Keep of the gradients: exact, sketch, or auto: exact if it fits.",
            rich_help_panel=MEASURE,
        ),
    ] = "auto",
    exact: Annotated[
        bool, typer.Option("--exact", help="The same as --engine exact.", rich_help_panel=MEASURE)
    ] = False,
    params: Annotated[
        str,
        typer.Option(
            help="Parameters that count: all, lora, or a REGEX in their names.",
            rich_help_panel=MEASURE,
        ),
    ] = "all",
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="Sketch each layer too, for `demerge layers`.", rich_help_panel=MEASURE
        ),
    ] = False,
    fisher: Annotated[
        str | None,
        typer.Option(
            metavar="RANGES",
            help="uniform:N, joint or partition.json: the Fisher of each range too, into OUT/fisher, for `merge`.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    mixed_precision: Annotated[
        str,
        typer.Option(
            "--mixed-precision", help="no, or bf16 in the model's passes.", rich_help_panel=MEASURE
        ),
    ] = "no",
    split: Annotated[
        str, typer.Option(help="train, test or all.", rich_help_panel=MEASURE)
    ] = "train",
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.")
    ] = False,
    memory: Annotated[
        float,
        typer.Option(
            min=0.001, help="GB for gradients or their sketches.", rich_help_panel=MEASURE
        ),
    ] = 2.0,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure the conflict map, cut [0, T) into ranges, and say how far to believe it.

    The map is kept: the same measurement again only cuts anew, without the model's gradients, and more groups are added to
    those it has. Stopped midway, the same command goes on after the last finished group. Under `accelerate launch` or
    `torchrun` the groups are shared among the processes.
    """
    from demerge.analysis.measurement.options import seconds_of
    from demerge.analysis.partitioning.cross_validation import count
    from demerge.analysis.report.text import lines, summary, write
    from demerge.analysis.stages.analyze import prepare
    from demerge.device import resolve_device

    n = ranges_of(ranges)
    plan = prepare(
        model,
        data,
        out,
        bins=bins,
        groups=groups,
        batch_size=train_batch_size,
        draws=draws,
        antithetic=antithetic,
        metric=metric,
        engine="exact" if exact else engine,
        params=params,
        layers=layers,
        seed=seed,
        split=split,
        skip_broken=skip_broken,
        memory=int(memory * 1e9),
        budget=None if budget is None else seconds_of(budget),
        se=se,
        precision=mixed_precision,
        ranges=n or 1,
        method=method,
        score=score,
        fisher=fisher,
        device=resolve_device(device),
    )
    if not plan.world.main:
        plan.map()
        return
    say(str(plan))
    with progress(plan.cost.passes, "analyze") as bar:
        map = plan.map(bar, say)
    for line in plan.lines(map):
        say(line)
    said = summary(
        map, n or count(map, method=method, score=score).chosen, method=method, score=score
    )
    for line in lines(said):
        say(line)
    words = data_words(split, skip_broken)
    files = [
        *write(map, out, said, model=model, data=data, options=words, stored=True),
        *plan.files,
    ]
    emit({"out": out, "files": files, **said}, out, json)
