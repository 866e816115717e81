"""`demerge layers`: which layers to train for experts on ranges, from a conflict map that was measured with --layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Json, emit, say, show


def layers(
    map: Annotated[
        Path,
        typer.Argument(
            metavar="MAP", help="conflict.safetensors of `demerge analyze --layers`, or its folder."
        ),
    ],
    ranges: Annotated[
        str, typer.Option(help="uniform:N or a partition.json: the ranges that get experts.")
    ] = "uniform:4",
    share: Annotated[
        float, typer.Option(help="Share of the parameters to train, in (0, 1].")
    ] = 0.1,
    model: Annotated[
        str | None, typer.Option(help="The base; a map of other weights is refused.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="Write the choice here, for `demerge finetune --train-layers`."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw gains and curve here, .svg or .png.")
    ] = None,
    json: Json = False,
) -> None:
    """Rank layers by what experts gain on them per parameter, judged on samples that did not rank them.

    demerge analyze base --data D --layers --metric adam -o map
    demerge layers map --share 0.1 -o layers.json
    demerge finetune base --data D --train-layers layers.json -o experts

    Where the ranking is not better than chance it says so, and the choice is all layers. The model and its data are not needed.
    """
    from demerge.analysis.layers import gains as stage
    from demerge.analysis.stages.ranges import load_map
    from demerge.storage.atomic import commit_json
    from demerge.timesteps import Partition

    stage.check_replaceable(out, plot)
    found = load_map(map, model)
    said = stage.layers(found, Partition.parse(ranges, found.T), share=share)
    for line in stage.lines(said):
        say(line)
    if out is not None:
        commit_json(out, said)
    if plot is not None:
        stage.draw(said, plot)
    emit({"out": out, "plot": plot, **said}, out or plot, json)
    if out is None and plot is None and not json:
        show("\n".join(said["train"]))
