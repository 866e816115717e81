"""`demerge compare`: ranking, plots, contact sheet and verdict of scores, as one report."""

from __future__ import annotations

from demerge.cli.common import Json, emit, say
from demerge.cli.options import from_options
from demerge.evaluation.options import CompareOptions


@from_options
def compare(options: CompareOptions, *, json: Json = False) -> None:
    """Rank models that share a protocol, and say whether merging beat its controls."""
    from demerge.evaluation.report.report import Report
    from demerge.evaluation.results import load_results

    results = load_results(options.runs)
    report = Report.of(
        results.scores,
        title=options.title,
        contact=results.contact,
        figures=results.figures,
        commands=results.commands,
        notes=results.notes,
    )
    path = report.save(options.out or results.folder / "report")
    say(str(report))
    emit({"report": str(path), **report.document()}, path, json)
