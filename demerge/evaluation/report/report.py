"""The report: ranking, plots, contact sheet and verdict of a set of scores.

    report = Report.of(scores)
    report.table                    a pandas frame, best first
    report.losses                   a frame of the loss by range, with intervals
    report.verdict, report.caveats  what the numbers say, and what to be wary of
    report.plot(), report.contact_sheet(), report.html
    report.save(DIR)

DIR/index.html      one page that loads nothing
DIR/scores.csv      a line for each model: means, standard deviations, verdicts, the whole protocol
DIR/scores.md       the same for a README
DIR/ranking.svg, tradeoff.svg, losses.svg, contact.png, and a .png next to every .svg
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from demerge.errors import UsageError
from demerge.evaluation.report import plots
from demerge.evaluation.report.page import page
from demerge.evaluation.report.range_table import range_losses_of
from demerge.evaluation.report.significance import Verdict
from demerge.evaluation.report.tables import csv, frame_of, markdown, table_lines
from demerge.evaluation.report.verdict import Findings
from demerge.evaluation.scores import (
    Protocol,
    Scores,
    Table,
    check_same_protocol,
    differences,
    tables_of,
)
from demerge.reporting.html import PageFigure, escape
from demerge.reporting.theme import LIGHT, Draw, Pictures, pictures, render
from demerge.storage.atomic import commit_bytes, commit_text, place_for

CAPTIONS = {
    "ranking": "Large dots: means with one standard deviation. Small dots: sampling seeds; thin"
    " lines join one seed, since models are compared seed by seed. Dashed: the base. Dotted: other"
    " real images.",
    "tradeoff": "Fidelity against variety, each model with its place in the ranking. The upper"
    " right corner is best.",
    "losses": "Held-out loss of each range against the base. Pale italics: the interval covers 0.",
}


@dataclass(frozen=True, eq=False)
class Report:
    """Models that share a protocol, compared.

    Attributes:
        ranked, unranked: the largest group of models that share a protocol, and the others.
        contact: images of each model, uint8 [n C H W], image i of every model from the same noise.
        figures: pictures about conflict and ranges, with captions.
        commands: the command lines that made the run.
        notes: sentences that stand with the caveats.
    """

    ranked: Table
    unranked: tuple[Table, ...] = ()
    title: str = "demerge report"
    contact: Mapping[str, Tensor] = field(default_factory=dict)
    figures: Sequence[PageFigure] = ()
    commands: Sequence[str] = ()
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, scores: Sequence[Scores], *, notes: Sequence[str] = (), **parts: Any) -> Report:
        """Compare scores; those of kind `real` are noise floors and are not ranked.

        Args:
            parts: title, contact, figures and commands; see the attributes.

        Raises:
            UsageError: if no model was scored.
            ComparisonError: if no two models share a protocol.
        """
        ranked, *unranked = tables_of(scores)
        if len(ranked.rows) == 1 and unranked:
            check_same_protocol([ranked.rows[0], unranked[0].rows[0]])
        left_out = []
        for table in unranked:
            models = ", ".join(row.model for row in table.rows)
            why = differences(table.protocol, ranked.protocol)
            left_out.append(f"Not ranked, since the protocol differs: {models} ({why}).")
        return cls(ranked, tuple(unranked), notes=[*notes, *left_out], **parts)

    def __repr__(self) -> str:
        names = ", ".join(row.model for row in self.ranked.rows)
        return f"Report({len(self.ranked.rows)} models, {self.outcome}: {names})"

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{escape(caveat)}</li>" for caveat in self.caveats)
        return f"<p>{escape(self.verdict)}</p>{self.summary.to_html()}<ul>{items}</ul>"

    def __str__(self) -> str:
        return "\n".join([*table_lines([self.ranked]), *(f"note: {note}" for note in self.notes)])

    def document(self) -> dict[str, Any]:
        """Return ranking and verdict as JSON values."""
        return {
            "ranking": [row.model for row in self.ranked.rows],
            "unranked": [row.model for table in self.unranked for row in table.rows],
            "outcome": self.outcome,
            "verdict": self.verdict,
            "caveats": self.caveats,
            "losses": [line.document() for line in range_losses_of(self._findings)],
        }

    @cached_property
    def _findings(self) -> Findings:
        return Findings.of(self.ranked)

    @property
    def table(self) -> pd.DataFrame:
        """One line for each model, best first, then the noise floors, with the whole protocol."""
        return frame_of(self._findings)

    @property
    def losses(self) -> pd.DataFrame:
        """A line for each model and range: the loss and its differences, with their intervals."""
        return pd.json_normalize([line.document() for line in range_losses_of(self._findings)])

    @property
    def summary(self) -> pd.DataFrame:
        """The table without the protocol, indexed by the model."""
        shared = [f.name for f in fields(Protocol)]
        others = ["rank", "rank_deficient", "model_sha256"]
        return self.table.set_index("model").drop(columns=[*shared, *others])

    @property
    def outcome(self) -> Verdict:
        """`better`, `worse`, `inconclusive` or `none`: the best merge against both controls."""
        return self._findings.outcome

    @property
    def verdict(self) -> str:
        """What was found and what to do, then the numbers, in one paragraph."""
        return self._findings.verdict

    @property
    def caveats(self) -> list[str]:
        """What a reader should be wary of."""
        return [*self._findings.caveats, *self.notes]

    @property
    def plots(self) -> list[str]:
        """The names that `plot` draws."""
        return list(self._drawings)

    def plot(self, name: str = "ranking", theme: Any = LIGHT) -> Figure:
        """Draw one of `plots`."""
        if name not in self._drawings:
            fix = f"use one of {', '.join(self._drawings)}"
            raise UsageError(f"there is no plot '{name}' of these scores", fix=fix)
        return self._drawings[name](theme)

    def contact_sheet(self) -> Figure:
        """Draw the models' images: one row for each model, one column for each starting noise."""
        if not self._images:
            fix = "evaluate again: it keeps the first 16 of each model"
            raise UsageError("there are no images to show", fix=fix)
        kinds = {row.model: row.kind for row in self.ranked.rows}
        return plots.contact_sheet(self._images, kinds)

    @property
    def html(self) -> str:
        """The whole page, which loads nothing."""
        return self._page(self._pictures())

    def save(self, out: str | Path) -> Path:
        """Write the report into the folder `out` and return the path of its page."""
        out, drawn = place_for(out), self._pictures()
        for name, plot in drawn.items():
            commit_bytes(out / f"{name}.svg", plot.svg)
            commit_bytes(out / f"{name}.png", plot.png)
        if self._images:
            commit_bytes(out / "contact.png", render(self.contact_sheet(), "png"))
        commit_text(out / "scores.csv", csv(self._findings))
        commit_text(out / "scores.md", markdown(self._findings, self.title, self.caveats))
        return commit_text(out / "index.html", self._page(drawn))

    def _page(self, drawn: Mapping[str, Pictures]) -> str:
        plots = {n: PageFigure(CAPTIONS[n], plot.svg, dark=plot.dark) for n, plot in drawn.items()}
        return page(
            self.title,
            self._findings,
            plots=plots,
            contact=self._images,
            figures=self.figures,
            commands=self.commands,
            caveats=self.caveats,
        )

    def _pictures(self) -> dict[str, Pictures]:
        return {name: pictures(draw) for name, draw in self._drawings.items()}

    @property
    def _drawings(self) -> dict[str, Draw]:
        rows, floors, base = self.ranked.rows, self.ranked.floors, self._findings.best("base")
        drawings: dict[str, Draw] = {}
        if len(rows) + len(floors) > 1:
            drawings["ranking"] = partial(plots.ranking, rows, floors)
        measured = [row for row in rows if row.by_seed("precision")]
        if len({(row.mean("recall"), row.mean("precision")) for row in measured}) > 1:
            drawings["tradeoff"] = partial(plots.tradeoff, rows)
        others = [row for row in rows if row is not base]
        own = None if base is None else base.losses
        if own and any(row.losses and row.losses.is_paired(own) for row in others):
            drawings["losses"] = partial(plots.losses, others, own)
        return drawings

    @property
    def _images(self) -> dict[str, Tensor]:
        rows = sorted(self.ranked.rows, key=lambda row: row is not self._findings.best("base"))
        return {row.model: self.contact[row.model] for row in rows if row.model in self.contact}
