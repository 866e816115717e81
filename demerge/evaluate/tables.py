"""Scores as tables: CSV for spreadsheets, Markdown for people.

Text that a spreadsheet would take for a formula gets an apostrophe in front; Markdown's own signs are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from demerge.evaluate.plots import LABELS
from demerge.evaluate.protocol import Comparison, Protocol, Row, Scores, compare, rank, rows_of
from demerge.evaluate.verdict import best, verdict, warnings
from demerge.pages import harmless

METRICS = ("fd", *LABELS)


def measured(rows: Sequence[Row]) -> list[str]:
    """Return the metrics that some row has, in a fixed order."""
    return [metric for metric in METRICS if any(row.values(metric) for row in rows)]


def label(metric: str, rows: Sequence[Row]) -> str:
    """Return a metric's name as it is printed."""
    return LABELS.get(metric) or rows[0].scores[0].protocol.distance


def against(row: Row, rows: Sequence[Row]) -> dict[str, Comparison]:
    """Compare a row with the base and the joint control, where these are other rows."""
    controls = {"base": best(rows, "base"), "joint": best(rows, "joint")}
    return {name: compare(row, other) for name, other in controls.items() if other is not None and other is not row}


def frame_of(rows: Sequence[Row], floors: Sequence[Row]) -> pd.DataFrame:
    """Return one line for each model, best first, then the noise floor: means, deviations, verdicts and the protocol."""
    lines = [_line(place, row, rows) for place, row in enumerate(rows, 1)]
    return pd.DataFrame([*lines, *(_line(None, floor, ()) for floor in floors)])


def _line(place: int | None, row: Row, rows: Sequence[Row]) -> dict[str, object]:
    line: dict[str, object] = {"rank": place, "model": row.model, "kind": row.kind}
    line["seeds"] = " ".join(map(str, row.seeds))
    for metric in measured([row]):
        line |= {metric: row.mean(metric), f"{metric}_sd": row.sd(metric)}
    if row.losses is not None:
        line |= {f"loss {name}": loss for name, loss in row.losses.means.items()}
    for name, result in against(row, rows).items():
        line |= {f"vs_{name}": result.difference, f"vs_{name}_verdict": result.verdict}
    line |= asdict(row.scores[0].protocol) | {"rank_deficient": row.scores[0].protocol.rank_deficient}
    return line | {"model_sha256": row.scores[0].model_sha256}


def lines(scores: Sequence[Scores]) -> list[str]:
    """Return the table as lines for a terminal, best first, noise floors last; unlike protocols stay unranked."""
    rows = rows_of(scores)
    groups: dict[Protocol, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.scores[0].protocol, []).append(row)
    texts = []
    for protocol, members in groups.items():
        names = measured(members)
        heads = ["model", "kind", *(label(metric, members) for metric in names)]
        body = [[row.model, row.kind, *(number(row, metric) for metric in names)] for row in rank(members)]
        widths = [max(len(line[i]) for line in [heads, *body]) for i in range(len(heads))]
        texts += [str(protocol), *("  ".join(map(str.ljust, line, widths)).rstrip() for line in [heads, *body])]
    return texts


def csv(rows: Sequence[Row], floors: Sequence[Row]) -> str:
    """Return the table as CSV."""
    frame = frame_of(rows, floors).astype({"rank": "Int64"})
    text = frame.select_dtypes(exclude="number").columns
    frame[text] = frame[text].map(lambda cell: harmless(cell) if isinstance(cell, str) else cell)
    return str(frame.to_csv(index=False, float_format="%.8g"))


def markdown(rows: Sequence[Row], floors: Sequence[Row], *, title: str) -> str:
    """Return title, verdict, table, warnings and protocol as Markdown."""
    metrics = measured(rows)
    first, *others = (label(metric, rows) for metric in metrics)
    heads = ["", "model", "kind", first, "against base", "against joint", *others]
    lines = [_cells(heads), _cells(["---:", "---", "---", *["---:"] * (len(metrics) + 2)])]
    for place, row in enumerate(rows, 1):
        results = against(row, rows)
        changes = [change(results[name]) if name in results else "" for name in ("base", "joint")]
        numbers = [number(row, metric) for metric in metrics]
        lines.append(_cells([str(place), escaped(row.model), row.kind, numbers[0], *changes, *numbers[1:]]))
    for floor in floors:
        numbers = [number(floor, metric) for metric in metrics]
        lines.append(_cells(["", escaped(floor.model), "noise floor", numbers[0], "", "", *numbers[1:]]))
    wary = [f"- {escaped(text)}" for text in warnings(rows, floors)]
    protocol = escaped(str(rows[0].scores[0].protocol))
    parts = [f"# {escaped(title)}", escaped(verdict(rows)), "\n".join(lines), "\n".join(wary), f"Protocol: {protocol}."]
    return "\n\n".join(part for part in parts if part) + "\n"


def number(row: Row, metric: str) -> str:
    """Return `mean ± sd` with the digits that the metric bears, or nothing where it was not measured."""
    mean, spread = row.mean(metric), row.sd(metric)
    if math.isnan(mean):
        return ""
    digits = 3 if metric not in ("fd", "kid") else min(6, max(0, 2 - math.floor(math.log10(abs(mean) or 1))))
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def change(result: Comparison) -> str:
    """Return `-5.2 % better`."""
    percent = "" if math.isnan(result.relative) else f"{100 * result.relative:+.1f} % "
    return f"{percent}{result.verdict}"


def escaped(text: str) -> str:
    """Return text without Markdown's or HTML's own signs in force, on one line."""
    signs: dict[str, str | int | None] = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ", "\r": " "}
    signs.update((c, f"\\{c}") for c in "\\`*_[]|#")
    return text.translate(str.maketrans(signs))


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
