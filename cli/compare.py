"""`demerge compare`: ranking, plots, contact sheet and verdict of scores, as one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Json, emit


def compare(
    runs: Annotated[list[Path], typer.Argument(help="A run folder with scores/, or score files (JSON).")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder of the report; default RUN/report.", show_default=False)
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the report.")] = "demerge report",
    json: Json = False,
) -> None:
    """Rank models that share a protocol and say whether merging beat the base and the joint control."""
    from demerge.evaluate.gather import gather
    from demerge.evaluate.protocol import rank, rows_of
    from demerge.evaluate.report import build_report
    from demerge.evaluate.verdict import outcome, verdict

    found = gather(runs)
    path = build_report(
        out or found.folder / "report",
        found.scores,
        title=title,
        contact=found.contact,
        figures=found.figures,
        commands=found.commands,
    )
    rows = rank(row for row in rows_of(found.scores) if row.kind != "real")
    best = {"ranking": [row.model for row in rows], "outcome": outcome(rows), "verdict": verdict(rows)}
    emit({"report": str(path), **best}, path, json)
