"""`demerge compare`: ranking, plots, contact sheet and verdict of scores, as one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Json, emit, say


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="A run folder with scores/, or score files (JSON).")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="Folder of the report; default RUN/report.", show_default=False
        ),
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the report.")] = "demerge report",
    json: Json = False,
) -> None:
    """Rank models that share a protocol and say whether merging beat the base and the joint control."""
    from demerge.evaluation.report.report import Report
    from demerge.evaluation.results import gather

    found = gather(runs)
    report = Report.of(
        found.scores,
        title=title,
        contact=found.contact,
        figures=found.figures,
        commands=found.commands,
        notes=found.notes,
    )
    path = report.save(out or found.folder / "report")
    say(str(report))
    ranking = [row.model for row in report.ranked.rows]
    unranked = [row.model for table in report.unranked for row in table.rows]
    result = {
        "report": str(path),
        "ranking": ranking,
        "unranked": unranked,
        "outcome": report.outcome,
    }
    emit({**result, "verdict": report.verdict, "caveats": report.caveats}, path, json)
