"""`demerge data check`: what a source of images holds, and what in it is broken."""

from __future__ import annotations

from typing import Annotated

import typer

from demerge.cli.common import Json, emit, progress, show
from demerge.options import DataOptions, spec_of

UNUSABLE = 3
SOURCE = spec_of(DataOptions.__dataclass_fields__["data"]).help

app = typer.Typer(no_args_is_help=True)


@app.callback()
def data() -> None:
    """Check data before a model reads it."""


@app.command()
def check(source: Annotated[str, typer.Argument(help=SOURCE)], json: Json = False) -> None:
    """Read every image and report counts, broken files, sizes, captions and a verdict.

    The exit code is 3 unless the whole source can be used.
    """
    from demerge.data import scan

    with progress(1, "check") as bar:
        result = scan(source, progress=bar)
    emit(result.document(), None, json)
    if not json:
        show(*result.lines())
    if not result.usable:
        raise typer.Exit(UNUSABLE)
