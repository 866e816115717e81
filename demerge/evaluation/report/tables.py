"""Scores as tables: CSV for spreadsheets, Markdown for people.

Text that a spreadsheet would take for a formula gets an apostrophe in front; Markdown's own signs are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import pandas as pd

from demerge.evaluation.report.plots import LABELS
from demerge.evaluation.report.significance import Comparison, compare
from demerge.evaluation.report.verdict import best, verdict, warnings
from demerge.evaluation.scores import Row, Table
from demerge.reporting.html import escape_formula

METRICS = ("fd", *LABELS)


def measured(rows: Sequence[Row]) -> list[str]:
    """Return the metrics that some row has, in a fixed order."""
    return [metric for metric in METRICS if any(row.values(metric) for row in rows)]


def label(metric: str, rows: Sequence[Row]) -> str:
    """Return a metric's name as it is printed."""
    return LABELS.get(metric) or rows[0].scores[0].protocol.title


def against(rows: Sequence[Row]) -> list[dict[str, Comparison]]:
    """Compare each row with the best base and the best joint control, if these are other rows."""
    found, controls = compare(rows), {"base": best(rows, "base"), "joint": best(rows, "joint")}
    return [
        {
            name: found[row.key, other.key]
            for name, other in controls.items()
            if other is not None and other is not row
        }
        for row in rows
    ]


def frame_of(table: Table) -> pd.DataFrame:
    """Return one line for each model, best first, then the noise floor: means, deviations, verdicts and the protocol."""
    results = [*against(table.rows), *({} for _ in table.floors)]
    places = [*range(1, len(table.rows) + 1), *(None for _ in table.floors)]
    lines = [
        _line(*parts) for parts in zip(places, [*table.rows, *table.floors], results, strict=True)
    ]
    return pd.DataFrame(lines).astype({"rank": "Int64"})


def _line(place: int | None, row: Row, results: Mapping[str, Comparison]) -> dict[str, object]:
    line: dict[str, object] = {"rank": place, "model": row.model, "kind": row.kind}
    line["seeds"] = " ".join(map(str, row.seeds))
    for metric in measured([row]):
        line |= {metric: row.mean(metric), f"{metric}_sd": row.sd(metric)}
    if row.losses is not None:
        line |= {f"loss {name}": loss for name, loss in row.losses.means.items()}
    for name, result in results.items():
        line |= {
            f"vs_{name}": result.difference,
            f"vs_{name}_p": result.p,
            f"vs_{name}_verdict": result.word,
        }
    line |= asdict(row.scores[0].protocol) | {
        "rank_deficient": row.scores[0].protocol.rank_deficient
    }
    return line | {"model_sha256": row.scores[0].model_sha256}


def lines(tables: Sequence[Table]) -> list[str]:
    """Return tables as lines for a terminal, each with its caveats and its verdict."""
    return [line for table in tables for line in _lines(table)]


def _lines(table: Table) -> list[str]:
    heads, body = _cells(table)
    widths = [max(map(len, column)) for column in zip(heads, *body, strict=True)]
    printed = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in [heads, *body]]
    notes = [f"note: {text}" for text in warnings(table.rows, table.floors)]
    return [str(table.protocol), *printed, *notes, verdict(table.rows)]


def _cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the lines of a table as it is printed."""
    rows, floors = table.rows, table.floors
    metrics, results = measured(rows), against(rows)
    first, *others = (label(metric, rows) for metric in metrics)
    body = []
    for place, row in enumerate([*rows, *floors]):
        found = results[place] if place < len(rows) else {}
        numbers = [number(row, metric) for metric in metrics]
        changes = [change(found[name]) if name in found else "" for name in ("base", "joint")]
        kind = "noise floor" if row.kind == "real" else row.kind
        body.append(
            [
                str(place + 1) if place < len(rows) else "",
                row.model,
                kind,
                numbers[0],
                *changes,
                *numbers[1:],
            ]
        )
    return ["", "model", "kind", first, "against base", "against joint", *others], body


def csv(table: Table) -> str:
    """Return the table as CSV."""
    frame = frame_of(table)
    text = frame.select_dtypes(exclude="number").columns
    frame[text] = frame[text].map(
        lambda cell: escape_formula(cell) if isinstance(cell, str) else cell
    )
    return str(frame.to_csv(index=False, float_format="%.8g"))


def markdown(table: Table, *, title: str, notes: Sequence[str] = ()) -> str:
    """Return title, verdict, table, warnings and protocol as Markdown."""
    heads, body = _cells(table)
    rule = ["---:", "---", "---", *["---:"] * (len(heads) - 3)]
    printed = [_line_of(heads), _line_of(rule), *(_line_of(map(escaped, cells)) for cells in body)]
    wary = [f"- {escaped(text)}" for text in [*warnings(table.rows, table.floors), *notes]]
    protocol = escaped(str(table.protocol))
    parts = [
        f"# {escaped(title)}",
        escaped(verdict(table.rows)),
        "\n".join(printed),
        "\n".join(wary),
        f"Protocol: {protocol}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def number(row: Row, metric: str) -> str:
    """Return `mean ± sd` with the digits that the metric bears, or nothing where it was not measured."""
    mean, spread = row.mean(metric), row.sd(metric)
    if math.isnan(mean):
        return ""
    digits = (
        3
        if metric not in ("fd", "kid")
        else min(6, max(0, 2 - math.floor(math.log10(abs(mean) or 1))))
    )
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def change(result: Comparison) -> str:
    """Return `-5.2 % better`, or `-5.2 % (rank-deficient)` if there is no verdict."""
    percent = "" if math.isnan(result.relative) else f"{100 * result.relative:+.1f} % "
    return percent + (f"({result.why})" if result.why else result.verdict)


def escaped(text: str) -> str:
    """Return text without Markdown's or HTML's own signs in force, on one line."""
    signs: dict[str, str | int | None] = {
        "<": "&lt;",
        ">": "&gt;",
        "&": "&amp;",
        "\n": " ",
        "\r": " ",
    }
    signs.update((c, f"\\{c}") for c in "\\`*_[]|#")
    return text.translate(str.maketrans(signs))


def _line_of(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
