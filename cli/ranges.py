"""`demerge ranges`: where to cut a base's timesteps, from a conflict map that was measured before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Json, data_words, emit, ranges_of, say, show
from demerge.errors import UsageError


def ranges(
    map: Annotated[
        Path,
        typer.Argument(
            metavar="MAP", help="conflict.safetensors of `demerge analyze`, or its folder."
        ),
    ],
    n: Annotated[
        str,
        typer.Option(
            "-n", "--ranges", help="Ranges to cut into; auto is as many as held-out groups support."
        ),
    ] = "auto",
    method: Annotated[
        str | None,
        typer.Option(
            help="gradient, hierarchical, uniform or logsnr; advised, the default, is gradient where that beats uniform."
        ),
    ] = None,
    score: Annotated[
        str, typer.Option(help="What gradient and hierarchical maximise: step, energy or cosine.")
    ] = "step",
    cuts: Annotated[
        str | None,
        typer.Option(help="A cut of your own in place of a method, for example 125,500."),
    ] = None,
    minimum: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Least width of a range in bins, for gradient and hierarchical; else a twentieth of [0, T).",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base; a map of other weights is refused.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The data, for the commands on the page.")
    ] = None,
    split: Annotated[str, typer.Option(help="Its split, for the commands on the page.")] = "train",
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Write the ranges here, for example partition.json, and conflict.html beside.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Cut [0, T) into ranges by a stored map; say what they gain, how sure that is, and what else there is.

    The model and its data are not needed.
    """
    from demerge.analysis.report.text import taken
    from demerge.analysis.stages import ranges as stage

    count = ranges_of(n)
    found = stage.load_map(map, model)
    given = None if cuts is None else stage.given_cuts(cuts, found.T)
    if given is not None and (method is not None or count not in (None, len(given))):
        raise UsageError(
            f"--cuts {cuts} fixes the method and {len(given)} ranges",
            fix="leave out --method and -n",
        )
    if out is not None:
        stage.check_replaceable(out)
    page = None if out is None else stage.page_beside(out)
    said = stage.ranges(
        found, count, method=method or stage.ADVISED, score=score, minimum=minimum, given=given
    )
    for line in stage.lines(said):
        say(line)
    if out is not None and page is not None:
        taken(found, said).save(out)
        words = data_words(split, skip_broken=False)
        stage.write_beside(
            found,
            said,
            page,
            stored=map,
            out=out,
            model=model,
            data=data,
            options=words,
            minimum=minimum,
        )
    emit({"out": out, "page": page, **said}, out, json)
    if out is None and not json:
        show(" ".join(f"{start}:{stop}" for start, stop in said["partition"]))
