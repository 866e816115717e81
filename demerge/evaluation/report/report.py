"""The report: ranking, plots, contact sheet and verdict of a set of scores.

    report = Report.of(scores)
    report.table                    a pandas frame, best first
    report.verdict, report.caveats  what the numbers say, and what to be wary of
    report.plot(), report.contact_sheet(), report.html
    report.save(DIR)

DIR/index.html      one page that loads nothing
DIR/scores.csv      a line for each model: means, standard deviations, verdicts, the whole protocol
DIR/scores.md       the same for a README
DIR/ranking.svg, tradeoff.svg, losses.svg, contact.png, and a .png beside every .svg
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from demerge.errors import ComparisonError, UsageError
from demerge.evaluation.report import plots
from demerge.evaluation.report.page import page
from demerge.evaluation.report.significance import Verdict
from demerge.evaluation.report.tables import csv, frame_of, lines, markdown
from demerge.evaluation.report.verdict import best, outcome, verdict, warnings
from demerge.evaluation.scores import Protocol, Row, Scores, Table, differences, tables_of
from demerge.reporting.html import PageFigure, escape
from demerge.reporting.theme import LIGHT, Draw, Pictures, pictures, render
from demerge.storage.atomic import commit_bytes, commit_text, place_for

CAPTIONS = {
    "ranking": "Large dots: means with one standard deviation. Small dots: sampling seeds; thin lines join one seed, since "
    "models are compared seed by seed. Dashed: the base. Dotted: other real images.",
    "tradeoff": "Fidelity against variety, each model with its place in the ranking: the upper right corner is best.",
    "losses": "Held-out loss of each range against the base.",
}


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """Models that share a protocol, compared.

    Attributes:
        ranked: the largest group of models that share a protocol.
        unranked: the other groups, which are named and not ranked.
        contact: images of each model, uint8 [n C H W], image i of every model from the same noise.
        figures: pictures about conflict and ranges, with captions.
        commands: the command lines that made the run.
        notes: sentences to stand with the caveats.
    """

    ranked: Table
    unranked: tuple[Table, ...] = ()
    title: str = "demerge report"
    contact: Mapping[str, Tensor] = field(default_factory=dict)
    figures: Sequence[PageFigure] = ()
    commands: Sequence[str] = ()
    notes: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        scores: Sequence[Scores],
        *,
        title: str = "demerge report",
        contact: Mapping[str, Tensor] | None = None,
        figures: Sequence[PageFigure] = (),
        commands: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> Report:
        """Compare scores; those of kind `real` are noise floors and are not ranked.

        Raises:
            UsageError: if no model was scored.
            ComparisonError: if no two models share a protocol.
        """
        ranked, *unranked = tables_of(scores)
        if len(ranked.rows) == 1 and unranked:
            a, b = ranked, unranked[0]
            raise ComparisonError(
                f"{a.rows[0].model} and {b.rows[0].model} were scored under unlike protocols: "
                f"{differences(a.protocol, b.protocol)}",
                fix="evaluate both with the same options, or compare those that share a protocol",
            )
        return cls(ranked, tuple(unranked), title, contact or {}, figures, commands, notes)

    def __repr__(self) -> str:
        """Say how many models are compared, and the outcome."""
        return f"Report({len(self.ranked.rows)} models, {self.outcome}: {', '.join(row.model for row in self.ranked.rows)})"

    def __str__(self) -> str:
        """Return the table with its caveats and the verdict, as a terminal shows them."""
        return "\n".join([*lines([self.ranked]), *(f"note: {note}" for note in self._notes)])

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{escape(caveat)}</li>" for caveat in self.caveats)
        return f"<p>{escape(self.verdict)}</p>{self.summary._repr_html_()}<ul>{items}</ul>"  # type: ignore[operator]

    @property
    def table(self) -> pd.DataFrame:
        """One line for each model, best first, then the noise floors, with the whole protocol."""
        return frame_of(self.ranked)

    @property
    def summary(self) -> pd.DataFrame:
        """The table without the protocol, indexed by the model."""
        same = [f.name for f in fields(Protocol)]
        return self.table.set_index("model").drop(
            columns=[*same, "rank", "rank_deficient", "model_sha256"]
        )

    @property
    def outcome(self) -> Verdict:
        """`better`, `worse`, `inconclusive` or `none`: the best merge against base and joint control."""
        return outcome(self.ranked.rows)

    @property
    def verdict(self) -> str:
        """What the numbers say, in one paragraph."""
        return verdict(self.ranked.rows)

    @property
    def caveats(self) -> list[str]:
        """What a reader should be wary of."""
        return [*warnings(self.ranked.rows, self.ranked.floors), *self._notes]

    @property
    def plots(self) -> list[str]:
        """The names that `plot` draws."""
        return list(self._drawn)

    def plot(self, name: str = "ranking") -> Figure:
        """Draw one of `plots`.

        Raises:
            UsageError: if there is no such plot of these scores.
        """
        if name not in self._drawn:
            raise UsageError(
                f"there is no plot '{name}' of these scores",
                fix=f"use one of {', '.join(self._drawn)}",
            )
        return self._drawn[name](LIGHT)

    def contact_sheet(self) -> Figure:
        """Draw the models' images: one row for each model, one column for each starting noise.

        Raises:
            UsageError: if the images were not kept.
        """
        if not self._contact:
            raise UsageError(
                "there are no images to show",
                fix="evaluate again: it keeps the first 16 of each model",
            )
        return self._sheet(LIGHT)

    @property
    def html(self) -> str:
        """The whole page, which loads nothing."""
        return self._page({name: pictures(draw) for name, draw in self._drawn.items()})

    def _page(self, drawn: Mapping[str, Pictures]) -> str:
        exhibits = {
            name: PageFigure(CAPTIONS[name], plot.svg, dark=plot.dark)
            for name, plot in drawn.items()
        }
        return page(
            self.title,
            self.ranked,
            plots=exhibits,
            contact=self._contact,
            figures=self.figures,
            commands=self.commands,
            notes=self._notes,
        )

    def save(self, out: Path | str) -> Path:
        """Write the report into the folder `out` and return the path of its page."""
        out = place_for(out)
        drawn = {name: pictures(draw) for name, draw in self._drawn.items()}
        for name, plot in drawn.items():
            commit_bytes(out / f"{name}.svg", plot.svg)
            commit_bytes(out / f"{name}.png", plot.png)
        if self._contact:
            commit_bytes(out / "contact.png", render(self._sheet(LIGHT), "png"))
        commit_text(out / "scores.csv", csv(self.ranked))
        commit_text(out / "scores.md", markdown(self.ranked, title=self.title, notes=self._notes))
        return commit_text(out / "index.html", self._page(drawn))

    @property
    def _notes(self) -> list[str]:
        """The notes, and which models were not ranked and why."""
        return [*self.notes, *(_unranked(table, self.ranked) for table in self.unranked)]

    @property
    def _drawn(self) -> dict[str, Draw]:
        return dict(_drawn(self.ranked.rows, self.ranked.floors))

    @property
    def _sheet(self) -> Draw:
        return partial(
            plots.contact_sheet, self._contact, {row.model: row.kind for row in self.ranked.rows}
        )

    @property
    def _contact(self) -> dict[str, Tensor]:
        """The images, the base's first and the others' in the order of the ranking."""
        rows = self.ranked.rows
        base = best(rows, "base")
        names = [*([base.model] if base else []), *(row.model for row in rows)]
        return {name: self.contact[name] for name in dict.fromkeys(names) if name in self.contact}


def _unranked(table: Table, ranked: Table) -> str:
    names = ", ".join(row.model for row in table.rows)
    return f"Not ranked, since the protocol differs: {names} ({differences(table.protocol, ranked.protocol)})."


def _drawn(rows: Sequence[Row], floors: Sequence[Row]) -> Iterator[tuple[str, Draw]]:
    if len(rows) + len(floors) > 1:
        yield "ranking", partial(plots.ranking, rows, floors)
    if (
        len(
            {(row.mean("recall"), row.mean("precision")) for row in rows if row.values("precision")}
        )
        > 1
    ):
        yield "tradeoff", partial(plots.tradeoff, rows)
    base = best(rows, "base")
    if (
        base is not None
        and base.losses is not None
        and any(row.losses for row in rows if row is not base)
    ):
        yield "losses", partial(plots.losses, [row for row in rows if row is not base], base.losses)
