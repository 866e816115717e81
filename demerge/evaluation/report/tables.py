"""Scores as tables: for a terminal, as Markdown and as CSV.

Text that a spreadsheet would take for a formula gets an apostrophe in front. Markdown's own signs
are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import pandas as pd

from demerge.evaluation.report.range_table import range_table
from demerge.evaluation.report.significance import Comparison
from demerge.evaluation.report.verdict import Findings
from demerge.evaluation.scores import Row, Table
from demerge.reporting.html import escape_formula

LABELS: Mapping[str, str] = {
    "kid": "KID",
    **{name: name for name in ("precision", "recall", "density", "coverage")},
    "diversity": "LPIPS diversity",
    "drift": "LPIPS drift",
}
MARKDOWN_SIGNS = str.maketrans(
    {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ", "\r": " "}
    | {sign: f"\\{sign}" for sign in "\\`*_[]|#"}
)


@dataclass(frozen=True, slots=True)
class Line:
    """A row as it is printed; `place` is empty for a noise floor."""

    row: Row
    place: str
    numbers: dict[str, str]
    against: dict[str, Comparison]

    @property
    def kind(self) -> str:
        """The kind of model, in words."""
        return "noise floor" if self.row.kind == "real" else self.row.kind

    def cells(self) -> list[str]:
        """Return the cells that stand under `heads`."""
        first, *others = self.numbers.values()
        changes = [_change(self.against.get(name)) for name in ("base", "joint")]
        return [self.place, self.row.model, self.kind, first, *changes, *others]


def measured(rows: Sequence[Row]) -> list[str]:
    """Return the metrics that some row has, in a fixed order."""
    return [metric for metric in ("fd", *LABELS) if any(row.by_seed(metric) for row in rows)]


def lines_of(findings: Findings) -> list[Line]:
    """Return the rows of a table, best first, then the noise floors."""
    table, metrics = findings.table, measured(findings.table.rows)
    lines = []
    for place, row in enumerate([*table.rows, *table.floors], 1):
        numbers = {metric: _number(row, metric) for metric in metrics}
        shown = str(place) if place <= len(table.rows) else ""
        lines.append(Line(row, shown, numbers, findings.against_controls(row)))
    return lines


def labels_of(table: Table) -> dict[str, str]:
    """Return the metrics' names as they are printed."""
    return {"fd": table.protocol.title, **LABELS}


def heads_of(table: Table) -> list[str]:
    """Return the heads of a table."""
    first, *others = (labels_of(table)[metric] for metric in measured(table.rows))
    return ["", "model", "kind", first, "against base", "against joint", *others]


def frame_of(findings: Findings) -> pd.DataFrame:
    """Return a line for each model and noise floor: means, deviations, verdicts, the protocol."""
    return pd.DataFrame(map(_record, lines_of(findings))).astype({"rank": "Int64"})


def _record(line: Line) -> dict[str, object]:
    row, protocol = line.row, line.row.protocol
    record: dict[str, object] = {"rank": int(line.place) if line.place else None}
    record |= {"model": row.model, "kind": row.kind, "seeds": " ".join(map(str, row.seeds))}
    for metric in measured([row]):
        record |= {metric: row.mean(metric), f"{metric}_sd": row.sd(metric)}
    for name, loss in (row.losses.intervals if row.losses else {}).items():
        record |= {f"loss {name}": loss.value, f"loss {name} low": loss.low}
        record[f"loss {name} high"] = loss.high
    for name, result in line.against.items():
        record |= {f"vs_{name}": result.difference, f"vs_{name}_p": result.p}
        record[f"vs_{name}_verdict"] = result.word
    record |= asdict(protocol) | {"rank_deficient": protocol.is_rank_deficient}
    return record | {"model_sha256": row.scores[0].model_sha256}


def table_lines(tables: Sequence[Table]) -> list[str]:
    """Return tables as lines for a terminal, each after its verdict and before its caveats."""
    lines = []
    for findings in map(Findings.of, tables):
        cells = [heads_of(findings.table), *(line.cells() for line in lines_of(findings))]
        lines += [findings.verdict, str(findings.table.protocol), *_aligned(cells)]
        lines += _aligned(range_table(findings))
        lines += [f"note: {text}" for text in findings.caveats]
    return lines


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def csv(findings: Findings) -> str:
    """Return the table as CSV."""
    frame = frame_of(findings)
    texts = frame.select_dtypes(exclude="number").columns
    frame[texts] = frame[texts].map(lambda x: escape_formula(x) if isinstance(x, str) else x)
    return str(frame.to_csv(index=False, float_format="%.8g"))


def markdown(findings: Findings, title: str, caveats: Sequence[str]) -> str:
    """Return title, verdict, table, caveats and protocol as Markdown."""
    heads = heads_of(findings.table)
    rule = ["---:", "---", "---", *["---:"] * (len(heads) - 3)]
    rows = [list(map(escape_markdown, line.cells())) for line in lines_of(findings)]
    losses = [list(map(escape_markdown, cells)) for cells in range_table(findings)]
    if losses:
        losses.insert(1, ["---", "---", *["---:"] * (len(losses[0]) - 2)])
    parts = [
        f"# {escape_markdown(title)}",
        escape_markdown(findings.verdict),
        _piped([heads, rule, *rows]),
        _piped(losses),
        "\n".join(f"- {escape_markdown(text)}" for text in caveats),
        f"Protocol: {escape_markdown(str(findings.table.protocol))}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _piped(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _number(row: Row, metric: str) -> str:
    mean, spread = row.mean(metric), row.sd(metric)
    if math.isnan(mean):
        return ""
    digits = 3
    if metric in ("fd", "kid"):
        digits = min(6, max(0, 2 - math.floor(math.log10(abs(mean) or 1))))
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def _change(result: Comparison | None) -> str:
    """Return `-5.2 % better`, or `-5.2 % (rank-deficient)` if there is no verdict."""
    if result is None:
        return ""
    return percent(result) + (f"({result.why})" if result.why else result.verdict)


def percent(result: Comparison) -> str:
    """Return `-5.2 % `, "" if the control's mean is 0 or unknown."""
    return "" if math.isnan(result.relative) else f"{100 * result.relative:+.1f} % "


def escape_markdown(text: str) -> str:
    """Return text on one line, without Markdown's or HTML's own signs in force."""
    return text.translate(MARKDOWN_SIGNS)
