"""The loss of each model in each range of timesteps, and its differences from the controls.

    loss         L, with its 95 % interval
    against X    L / L_X - 1, with its 95 % interval, from the same images, timesteps and noise

X is the best base, joint control and routed ensemble, so that a merge stands next to the experts
that it was made from. A difference is much surer than either loss. Each interval is of one number;
none is widened for the size of the table. Models with losses on other ranges or draws have no
difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from demerge.evaluation.metrics.range_losses import Interval
from demerge.evaluation.report.significance import CONTROLS
from demerge.evaluation.report.verdict import Findings
from demerge.evaluation.scores import Kind
from demerge.timesteps import TimestepRange

REFERENCES: Mapping[Kind, str] = {**CONTROLS, "ensemble": "the routed ensemble"}


@dataclass(frozen=True, slots=True)
class RangeLoss:
    """The loss of a model in a range, and its relative differences from controls, by their kind."""

    range: str
    model: str
    kind: Kind
    loss: Interval
    against: dict[Kind, Interval]

    def document(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def cells(self, references: Sequence[Kind]) -> list[str]:
        """Return the cells that stand under `range_heads`."""
        changes = [
            self.against[kind].percent() if kind in self.against else "" for kind in references
        ]
        return [self.range, self.model, str(self.loss), *changes]


def range_losses_of(findings: Findings) -> list[RangeLoss]:
    """Return the losses of a table, range by range, each in the order of the ranking."""
    rows = [row for row in findings.table.rows if row.losses is not None]
    controls = {kind: findings.best(kind) for kind in REFERENCES}
    lines = []
    for row in rows:
        losses = row.losses
        assert losses is not None
        against = {}
        for kind, control in controls.items():
            if control is None or control is row or control.losses is None:
                continue
            if losses.is_paired(control.losses):
                against[kind] = losses.change(control.losses)
        for name, loss in losses.intervals.items():
            changes = {kind: change[name] for kind, change in against.items()}
            lines.append(RangeLoss(name, row.model, row.kind, loss, changes))
    return sorted(lines, key=lambda line: TimestepRange.parse(line.range))


def range_table(findings: Findings) -> list[list[str]]:
    """Return heads and cells of the table, empty without losses; each range is named once."""
    lines = range_losses_of(findings)
    if not lines:
        return []
    references = [kind for kind in REFERENCES if any(kind in line.against for line in lines)]
    heads = ["timesteps", "model", "loss (95 %)", *(f"against {kind}" for kind in references)]
    rows, last = [heads], ""
    for line in lines:
        span, *others = line.cells(references)
        rows.append(["" if span == last else span, *others])
        last = span
    return rows
