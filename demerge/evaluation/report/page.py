"""The report of `compare` as one HTML page: verdict, images, ranking, plots, protocol."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

from torch import Tensor

from demerge.evaluation.report.significance import Comparison
from demerge.evaluation.report.tables import against, label, measured, number
from demerge.evaluation.report.verdict import best, outcome, verdict, warnings
from demerge.evaluation.scores import HIGHER_IS_BETTER, Protocol, Row, Table
from demerge.reporting.html import PageFigure, escape, figure, render_page, section, uri
from demerge.reporting.images import grid, png

GREY = 128  # between the images, on light and on dark pages
EYEBROWS = {
    "better": "These checkpoints: merging helped",
    "worse": "These checkpoints: a control does better",
    "inconclusive": "Inconclusive",
    "none": "No verdict",
}


def page(
    title: str,
    table: Table,
    *,
    plots: Mapping[str, PageFigure],
    contact: Mapping[str, Tensor],
    figures: Sequence[PageFigure],
    commands: Sequence[str],
    notes: Sequence[str],
) -> str:
    """Return the page of a table; `notes` are sentences that stand with its caveats."""
    rows, floors = table.rows, table.floors
    caveats = _list([*warnings(rows, floors), *notes], "warn")
    sections = [
        _verdict(rows),
        _tiles(rows, floors),
        section(
            "Ranking",
            RANKING,
            _ranking(rows, floors) + caveats + _gallery(plots, ("ranking", "tradeoff")),
        ),
        _contact(contact, rows),
        section("Conflict and ranges", CONFLICT, _figures(figures)) if figures else "",
        section("Validation loss by range", LOSSES, _gallery(plots, ("losses",)))
        if "losses" in plots
        else "",
        section(
            "Protocol",
            "All numbers above share it, field by field.",
            _protocol(table.protocol, rows),
        ),
        section("Commands", "What made this report, to be run again.", _code(commands))
        if commands
        else "",
    ]
    footer = "Made by demerge. The same numbers lie beside this page in scores.csv and scores.md."
    return render_page(title, table.protocol, sections, footer)


RANKING = (
    "Mean ± standard deviation over sampling seeds; all models draw from the same noise. A change against a control is the "
    "mean of the paired differences, tested by a paired t test with Holm's correction over all comparisons of the table, so "
    "that equal models give a false verdict somewhere in it with a probability of at most 5 %."
)
CONFLICT = "How far the gradients of different timesteps agree on the base, and where the timesteps were cut."
LOSSES = (
    "Change against the base on held-out images, with the same images, timesteps and noise for every model. Pale italics: "
    "within two standard errors of zero. Negative is better. Loss does not rank models as the Frechet distance does."
)


def _verdict(rows: Sequence[Row]) -> str:
    result = outcome(rows)
    eyebrow = f'<div class="eyebrow">{EYEBROWS[result]}</div>'
    return f'<section class="verdict {result}">{eyebrow}\n<p>{escape(verdict(rows))}</p></section>'


def _tiles(rows: Sequence[Row], floors: Sequence[Row]) -> str:
    chosen = [(name, best(rows, kind)) for kind, name in TILES.items()]  # type: ignore[arg-type]
    tiles = [
        _tile(name, row)
        for name, row in [*chosen, *(("noise floor", floor) for floor in floors[:1])]
        if row is not None
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


TILES = {
    "base": "base",
    "joint": "joint control",
    "ensemble": "routed ensemble",
    "merge": "best merge",
}


def _tile(name: str, row: Row) -> str:
    shown = name if row.model == name else f"{name}: {row.model}"
    return f'<div class="tile"><b>{row.mean("fd"):.2f}</b><span>{escape(shown)}</span></div>'


def _contact(contact: Mapping[str, Tensor], rows: Sequence[Row]) -> str:
    if not contact:
        return ""
    kinds = {row.model: row.kind for row in rows}
    strips = "".join(
        f'<span><span class="kind {kinds.get(name, "model")}">{escape(name)}</span></span>'
        f'<img alt="{len(images)} images of {escape(name)}" src="{uri(_strip(images), "png")}">'
        for name, images in contact.items()
    )
    return section(
        "Same noise, different models",
        "One column is one starting noise; the images were not chosen.",
        f'<div class="scroll"><div class="sheet">{strips}</div></div>',
    )


def _strip(images: Tensor) -> bytes:
    scale = max(1, 32 // images.shape[-1])
    return png(
        grid(images.cpu(), len(images), gap=max(1, images.shape[-1] // 16), background=GREY),
        scale=scale,
    )


def _ranking(rows: Sequence[Row], floors: Sequence[Row]) -> str:
    metrics = measured(rows)
    first, *others = (
        f'<th class="num">{escape(label(m, rows))} {"↑" if m in HIGHER_IS_BETTER else "↓"}</th>'
        for m in metrics
    )
    heads = f"<th></th><th>model</th>{first}<th>against base</th><th>against joint</th>{''.join(others)}"
    tops = {metric: _top(rows, metric) for metric in metrics}
    numbered = enumerate(zip(rows, against(rows), strict=True), 1)
    lines = [
        f'<tr><td class="num">{place}</td>{_line(row, found, tops)}</tr>'
        for place, (row, found) in numbered
    ]
    lines += [
        f'<tr class="floor"><td></td>{_line(floor, {}, dict.fromkeys(metrics))}</tr>'
        for floor in floors
    ]
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _line(row: Row, found: Mapping[str, Comparison], tops: Mapping[str, Row | None]) -> str:
    kind = "noise floor" if row.kind == "real" else row.kind
    first, *others = (_cell(row, metric, row is top) for metric, top in tops.items())
    changes = "".join(_change(found.get(name)) for name in ("base", "joint"))
    name = (
        f'<td class="name">{escape(row.model)}<br><span class="kind {row.kind}">{kind}</span></td>'
    )
    return f"{name}{first}{changes}{''.join(others)}"


def _change(result: Comparison | None) -> str:
    if result is None:
        return "<td></td>"
    percent = "" if math.isnan(result.relative) else f"{100 * result.relative:+.1f} %"
    return f'<td class="change {result.verdict}">{percent}<small>{escape(result.word)}</small></td>'


def _cell(row: Row, metric: str, top: bool) -> str:
    mean, _, spread = number(row, metric).partition(" ± ")
    emphasis = f'<span class="best">{mean}</span>' if top else mean
    return f'<td class="num">{emphasis}' + (
        f"<small>± {spread}</small></td>" if spread else "</td>"
    )


def _top(rows: Sequence[Row], metric: str) -> Row | None:
    if metric == "drift":
        return None
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    known = [row for row in rows if not math.isnan(row.mean(metric))]
    return min(known, key=lambda row: sign * row.mean(metric), default=None)


def _gallery(plots: Mapping[str, PageFigure], names: Iterable[str]) -> str:
    return "".join(figure(plots[name]) for name in names if name in plots)


def _figures(figures: Sequence[PageFigure]) -> str:
    return f'<div class="gallery">{"".join(map(figure, figures))}</div>'


def _protocol(protocol: Protocol, rows: Sequence[Row]) -> str:
    facts = {f.name.replace("_", " "): getattr(protocol, f.name) for f in fields(protocol)}
    facts |= {
        "sampling seeds": ", ".join(
            sorted({str(seed) for row in rows for seed in row.seeds}, key=int)
        )
    }
    facts |= {
        f"sha256 of {row.model}": row.scores[0].model_sha256
        for row in rows
        if row.scores[0].model_sha256
    }
    return (
        "<dl>"
        + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
        + "</dl>"
    )


def _list(items: Sequence[str], kind: str) -> str:
    return f'<ul class="{kind}">' + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _code(commands: Sequence[str]) -> str:
    return "<pre>" + "\n".join(map(escape, commands)) + "</pre>"
