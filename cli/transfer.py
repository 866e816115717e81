"""`demerge transfer`: what each expert does to the loss of each range, predicted from a stored map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Json, emit, progress, say, show


def transfer(
    map: Annotated[
        Path,
        typer.Argument(
            metavar="MAP",
            help="conflict.safetensors of `demerge analyze`, or its folder.",
            show_default=False,
        ),
    ],
    experts: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPERT...",
            help="Models finetuned from the base, or LoRA files of it.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str,
        typer.Option(
            "--base",
            help="The model that the map was measured on: folder, .safetensors file or Hub id.",
            show_default=False,
        ),
    ],
    ranges: Annotated[
        str | None,
        typer.Option(help="uniform:N, joint or a partition.json; the experts' own by default."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder that gets transfer.json and the plots."),
    ] = None,
    skip_text_encoder: Annotated[
        bool,
        typer.Option(
            "--skip-text-encoder", help="Leave out what a LoRA does to text encoders, else refused."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Predict how each expert changes the loss of each range, to first order, without a GPU, the model or its data.

    demerge transfer runs/conflict experts/0000-0250 experts/0250-1000 --base base -o runs/transfer
    """
    from demerge.analysis.stages.transfer import check_replaceable, document, lines, prepare, write

    if out is not None:
        check_replaceable(out)
    plan = prepare(map, base, experts, ranges=ranges, skip_text=skip_text_encoder)
    for line in plan.lines():
        say(line)
    with progress(plan.tensors, "transfer") as bar:
        made = plan.run(bar)
    files = [] if out is None else write(made, plan, out)
    for line in lines(made):
        if out is None and not json:
            show(line)
        else:
            say(line)
    emit({"out": out, "files": files, **document(made, plan)}, out, json)
