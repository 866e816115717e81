"""The report of `compare` as one HTML page; its template is assets/comparison.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from jinja2 import Environment, StrictUndefined
from torch import Tensor

from demerge.evaluation.report.range_table import range_table
from demerge.evaluation.report.tables import labels_of, lines_of, measured, percent
from demerge.evaluation.report.verdict import Findings
from demerge.evaluation.scores import HIGHER_IS_BETTER, Row, rank
from demerge.reporting.html import ASSETS, PageFigure, figure, render_page, uri
from demerge.reporting.images import grid, png

GREY = 128  # between the images, on light and on dark pages


def page(
    title: str,
    findings: Findings,
    *,
    plots: Mapping[str, PageFigure],
    contact: Mapping[str, Tensor],
    figures: Sequence[PageFigure],
    commands: Sequence[str],
    caveats: Sequence[str],
) -> str:
    """Return the page of a table; for its parts see `Report`."""
    rows = findings.table.rows
    metrics = measured(rows)
    tops = {m: None if m == "drift" else next(iter(rank(rows, m)), None) for m in metrics}
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = (ASSETS / "comparison.html").read_text(encoding="utf-8")
    body = environment.from_string(template).render(
        findings=findings,
        metrics=metrics,
        labels=labels_of(findings.table),
        higher_is_better=HIGHER_IS_BETTER,
        lines=lines_of(findings),
        percent=percent,
        tops=tops,
        caveats=caveats,
        range_table=range_table(findings),
        plots={"losses": "", **{name: figure(plot) for name, plot in plots.items()}},
        strips=_strips(contact, rows),
        figures=list(map(figure, figures)),
        facts=_facts(findings),
        commands=commands,
    )
    footer = "Made by demerge. scores.csv and scores.md next to this page hold the same numbers."
    return render_page(title, findings.table.protocol, [body], footer)


def _strips(contact: Mapping[str, Tensor], rows: Sequence[Row]) -> list[dict[str, object]]:
    kinds, strips = {row.model: row.kind for row in rows}, []
    for name, images in contact.items():
        gap, scale = max(1, images.shape[-1] // 16), max(1, 32 // images.shape[-1])
        strip = png(grid(images.cpu(), len(images), gap=gap, background=GREY), scale=scale)
        facts = {"name": name, "kind": kinds[name], "count": len(images)}
        strips.append({**facts, "uri": uri(strip, "png")})
    return strips


def _facts(findings: Findings) -> dict[str, object]:
    rows, protocol = findings.table.rows, asdict(findings.table.protocol)
    facts: dict[str, object] = {name.replace("_", " "): fact for name, fact in protocol.items()}
    seeds = sorted({seed for row in rows for seed in row.seeds})
    facts["sampling seeds"] = ", ".join(map(str, seeds))
    hashes = {f"sha256 of {row.model}": row.scores[0].model_sha256 for row in rows}
    return facts | {name: digest for name, digest in hashes.items() if digest}
