"""The report of `compare` as one HTML page: verdict, images, ranking, plots, protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from torch import Tensor

from demerge.evaluation.report.significance import Comparison, Verdict
from demerge.evaluation.report.tables import Line, heads_of, lines_of, measured, percent
from demerge.evaluation.report.verdict import Findings
from demerge.evaluation.scores import HIGHER_IS_BETTER, Kind, Protocol, Row, rank
from demerge.reporting.html import PageFigure, escape, figure, render_page, section, uri
from demerge.reporting.images import grid, png

GREY = 128  # between the images, on light and on dark pages
EYEBROWS: Mapping[Verdict, str] = {
    "better": "These checkpoints: merging helped",
    "worse": "These checkpoints: a control does better",
    "inconclusive": "Inconclusive",
    "none": "No verdict",
}
TILES: Mapping[Kind, str] = {
    "base": "base",
    "joint": "joint control",
    "ensemble": "routed ensemble",
    "merge": "best merge",
}
RANKING = (
    "Mean ± standard deviation over sampling seeds; all models draw from the same noise. A change"
    " against a control is the mean of the paired differences. It is tested by a paired t test with"
    " Holm's correction over all comparisons of the table: equal models give a false verdict"
    " somewhere in it with a probability of at most 5 %."
)
CONFLICT = (
    "How far the gradients of different timesteps agree on the base, and the ranges they give."
)
LOSSES = (
    "Change against the base on held-out images, with the same images, timesteps and noise for"
    " every model. Pale italics: within two standard errors of zero. Negative is better. Loss does"
    " not rank models as the Frechet distance does."
)


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
    table, outcome = findings.table, findings.outcome
    eyebrow = f'<div class="eyebrow">{EYEBROWS[outcome]}</div>'
    verdict = f"{eyebrow}\n<p>{escape(findings.verdict)}</p>"
    warnings = "".join(f"<li>{escape(text)}</li>" for text in caveats)
    shown = {name: figure(plot) for name, plot in plots.items()}
    losses, drawn = shown.pop("losses", ""), "".join(shown.values())
    ranking = f'{_ranking(findings)}<ul class="warn">{warnings}</ul>{drawn}'
    sections = [
        f'<section class="verdict {outcome}">{verdict}</section>',
        _tiles(findings),
        section("Ranking", RANKING, ranking),
        _contact(contact, table.rows),
    ]
    if figures:
        gallery = f'<div class="gallery">{"".join(map(figure, figures))}</div>'
        sections.append(section("Conflict and ranges", CONFLICT, gallery))
    if losses:
        sections.append(section("Validation loss by range", LOSSES, losses))
    shared = "All numbers above share it, field by field."
    sections.append(section("Protocol", shared, _protocol(table.protocol, table.rows)))
    if commands:
        code = "<pre>" + "\n".join(map(escape, commands)) + "</pre>"
        sections.append(section("Commands", "Run them again to make this report again.", code))
    footer = "Made by demerge. scores.csv and scores.md next to this page hold the same numbers."
    return render_page(title, table.protocol, sections, footer)


def _tiles(findings: Findings) -> str:
    chosen = [(name, findings.best(kind)) for kind, name in TILES.items()]
    chosen += [("noise floor", floor) for floor in findings.table.floors[:1]]
    tiles = ""
    for name, row in chosen:
        if row is not None:
            shown = escape(name if row.model == name else f"{name}: {row.model}")
            tiles += f'<div class="tile"><b>{row.mean("fd"):.2f}</b><span>{shown}</span></div>'
    return f'<div class="tiles">{tiles}</div>'


def _contact(contact: Mapping[str, Tensor], rows: Sequence[Row]) -> str:
    if not contact:
        return ""
    kinds = {row.model: row.kind for row in rows}
    strips = ""
    for name, images in contact.items():
        gap, scale = max(1, images.shape[-1] // 16), max(1, 32 // images.shape[-1])
        strip = png(grid(images.cpu(), len(images), gap=gap, background=GREY), scale=scale)
        shown, kind = escape(name), kinds.get(name, "model")
        strips += f'<span><span class="kind {kind}">{shown}</span></span>'
        strips += f'<img alt="{len(images)} images of {shown}" src="{uri(strip, "png")}">'
    lead = "One column is one starting noise; the images were not chosen."
    sheet = f'<div class="scroll"><div class="sheet">{strips}</div></div>'
    return section("Same noise, different models", lead, sheet)


def _ranking(findings: Findings) -> str:
    table = findings.table
    metrics = measured(table.rows)
    place, model, _, first, base, joint, *others = map(escape, heads_of(table))
    first, *others = (
        f'<th class="num">{head} {"↑" if metric in HIGHER_IS_BETTER else "↓"}</th>'
        for head, metric in zip([first, *others], metrics, strict=True)
    )
    heads = f"<th>{place}</th><th>{model}</th>{first}<th>{base}</th><th>{joint}</th>"
    head = f"<thead><tr>{heads}{''.join(others)}</tr></thead>"
    tops = {m: None if m == "drift" else next(iter(rank(table.rows, m)), None) for m in metrics}
    body = "".join(_table_row(line, tops) for line in lines_of(findings))
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _table_row(line: Line, tops: Mapping[str, Row | None]) -> str:
    row = line.row
    first, *others = (_cell(line.numbers[m], row is top) for m, top in tops.items())
    changes = _change(line.against.get("base")) + _change(line.against.get("joint"))
    kind = f'<span class="kind {row.kind}">{line.kind}</span>'
    name = f'<td class="name">{escape(row.model)}<br>{kind}</td>'
    cells = f"{name}{first}{changes}{''.join(others)}"
    if not line.place:
        return f'<tr class="floor"><td></td>{cells}</tr>'
    return f'<tr><td class="num">{line.place}</td>{cells}</tr>'


def _change(result: Comparison | None) -> str:
    if result is None:
        return "<td></td>"
    word = f"<small>{escape(result.word)}</small>"
    return f'<td class="change {result.verdict}">{percent(result).rstrip()}{word}</td>'


def _cell(number: str, is_top: bool) -> str:
    mean, _, spread = number.partition(" ± ")
    mean = f'<span class="best">{mean}</span>' if is_top else mean
    return f'<td class="num">{mean}{f"<small>± {spread}</small>" if spread else ""}</td>'


def _protocol(protocol: Protocol, rows: Sequence[Row]) -> str:
    facts = {f.name.replace("_", " "): getattr(protocol, f.name) for f in fields(protocol)}
    seeds = sorted({seed for row in rows for seed in row.seeds})
    facts["sampling seeds"] = ", ".join(map(str, seeds))
    for row in rows:
        if row.scores[0].model_sha256:
            facts[f"sha256 of {row.model}"] = row.scores[0].model_sha256
    terms = "".join(f"<dt>{escape(key)}</dt><dd>{escape(fact)}</dd>" for key, fact in facts.items())
    return f"<dl>{terms}</dl>"
