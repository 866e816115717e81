"""The report: ranking, plots, contact sheet and verdict of a set of scores, written into one folder.

DIR/index.html      one page that loads nothing
DIR/scores.csv      a line for each model: means, standard deviations, verdicts, the whole protocol
DIR/scores.md       the same for a README
DIR/ranking.svg, tradeoff.svg, losses.svg, contact.png, and a .png beside every .svg
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from demerge.errors import UsageError
from demerge.evaluate import plots
from demerge.evaluate.page import page
from demerge.evaluate.protocol import Row, Scores, rank, rows_of
from demerge.evaluate.tables import csv, markdown
from demerge.evaluate.verdict import best
from demerge.figures import DARK, LIGHT, Draw, render
from demerge.files import commit_file, commit_text
from demerge.pages import Exhibit

CAPTIONS = {
    "ranking": "Small dots: sampling seeds; large dots: means with one standard deviation. Dashed: the base, its band of 1.3 % "
    "within which nothing counts. Dotted: other real images.",
    "tradeoff": "Fidelity against variety, each model with its place in the ranking: the upper right corner is best.",
    "losses": "Held-out loss of each range against the base.",
}


def build_report(
    out: Path,
    scores: Sequence[Scores],
    *,
    title: str = "demerge report",
    contact: Mapping[str, Tensor] | None = None,
    figures: Sequence[Exhibit] = (),
    commands: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write the report of scores into the folder `out` and return the path of its page.

    Args:
        scores: one for each model and sampling seed; those of kind `real` are noise floors and are not ranked.
        contact: images of each model, uint8 [n C H W], image i of every model from the same noise.
        figures: pictures about conflict and ranges, with captions.
        commands: the command lines that made the run.
        notes: sentences to stand beside the warnings.

    Raises:
        UsageError: where no model was scored.
        ComparisonError: where the scores' protocols differ.
    """
    rows = rows_of(scores)
    floors, ranked = [row for row in rows if row.kind == "real"], rank([row for row in rows if row.kind != "real"])
    if not ranked:
        raise UsageError("there are no scores of a model to report", fix="make some with `demerge evaluate`")
    drawn = dict(_drawn(ranked, floors))
    exhibits = {}
    for name, draw in drawn.items():
        light, dark = (render(draw, theme, "svg") for theme in (LIGHT, DARK))
        exhibits[name] = Exhibit(CAPTIONS[name], light, dark=dark)
        _commit(out / f"{name}.svg", light)
        _commit(out / f"{name}.png", render(draw, LIGHT, "png"))
    ordered = _ordered(contact or {}, ranked)
    if ordered:
        _commit(out / "contact.png", render(partial(plots.contact_sheet, ordered), LIGHT, "png"))
    commit_text(out / "scores.csv", csv(ranked, floors))
    commit_text(out / "scores.md", markdown(ranked, floors, title=title))
    html = page(title, ranked, floors, plots=exhibits, contact=ordered, figures=figures, commands=commands, notes=notes)
    return commit_text(out / "index.html", html)


def _drawn(rows: Sequence[Row], floors: Sequence[Row]) -> Iterator[tuple[str, Draw]]:
    yield "ranking", partial(plots.ranking, rows, floors)
    if len(rows) > 1 and all(row.values("precision") for row in rows):
        yield "tradeoff", partial(plots.tradeoff, rows)
    base = best(rows, "base")
    if base is not None and base.losses is not None and any(row.losses for row in rows if row is not base):
        yield "losses", partial(plots.losses, [row for row in rows if row is not base], base.losses)


def _ordered(contact: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
    """Put the base first, the others in the order of the ranking, and what was not scored last."""
    base = best(rows, "base")
    names = [*([base.model] if base else []), *(row.model for row in rows), *contact]
    return {name: contact[name] for name in dict.fromkeys(names) if name in contact}


def _commit(path: Path, data: bytes) -> None:
    commit_file(path, lambda stream: stream.write(data))
