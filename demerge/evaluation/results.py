"""What `compare` reads from a run folder: scores, contact strips, conflict plots, commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from demerge.errors import InputError, UsageError
from demerge.evaluation.score_files import load_scores, read_scores
from demerge.evaluation.scores import Scores
from demerge.reporting.html import PageFigure
from demerge.storage.layout import inside
from demerge.storage.schema import Record, read_record

CAPTIONS = {
    "heatmap": "Similarity of the gradients of two timesteps on the base."
    " Above the diagonal: its standard error.",
    "similarity": "How similarity falls with the distance between timesteps.",
    "curve": "Share of the conflict that each number of ranges resolves, for three partitions.",
    "support": "How often each place becomes a boundary when the groups of samples are resampled.",
    "strength": "Strength of the mean gradient, and the number of samples its noise is worth.",
}
DARK = ".dark.svg"


class Commands(Record):
    """A commands.json: the command lines that made a run."""

    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Results:
    """What a report is made of, and the folder it belongs to."""

    folder: Path
    scores: list[Scores]
    contact: Mapping[str, Tensor]
    figures: tuple[PageFigure, ...] = ()
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_results(runs: Sequence[str | Path]) -> Results:
    """Read one run folder, or score files. A link that leads out of a run folder is not followed.

    Raises:
        InputError: if a path is missing or holds no scores, or a score is linked out of the run.
        UsageError: if folders and files are mixed.
    """
    paths = list(map(Path, runs))
    for path in paths:
        if not path.exists():
            what = f"{path}: no such file or folder"
            raise InputError(what, fix="name a run folder or score files")
    if len(paths) == 1 and paths[0].is_dir():
        return _load_run(paths[0])
    if any(path.is_dir() for path in paths):
        fix = "name one run folder, or score files alone"
        raise UsageError("several paths were given, and some are folders", fix=fix)
    return Results(paths[0].parent, *read_scores(paths))


def _load_run(run: Path) -> Results:
    folder = run / "scores" if (run / "scores").is_dir() else run
    inside(run, folder)
    scores, contact = load_scores(folder)
    files = [*run.glob("*.svg"), *(run / "conflict").glob("*.svg")]
    plots = sorted((path for path in files if not path.name.endswith(DARK)), key=_order)
    figures: list[PageFigure] = []
    commands: tuple[str, ...] = ()
    notes: list[str] = []
    for path in [*plots, run / "commands.json"]:
        if not _lies_inside(run, path):
            notes.append(f"{path.relative_to(run)} is a link out of the run. It was left out.")
        elif path.suffix == ".svg":
            figures.append(_read_figure(run, path))
        elif path.is_file():
            commands = read_record(path, Commands, fix="remove it").commands
    return Results(run, scores, contact, tuple(figures), commands, tuple(notes))


def _read_figure(run: Path, plot: Path) -> PageFigure:
    """Read a plot, and next to it the same for dark pages, as `demerge analyze` writes it."""
    dark = plot.with_suffix(DARK)
    caption = CAPTIONS.get(plot.stem, plot.stem.replace("_", " ").replace("-", " "))
    has_dark = dark.is_file() and _lies_inside(run, dark)
    return PageFigure(caption, plot.read_bytes(), dark=dark.read_bytes() if has_dark else None)


def _lies_inside(run: Path, path: Path) -> bool:
    try:
        return bool(inside(run, path))
    except InputError:
        return False


def _order(path: Path) -> tuple[int, str]:
    known = list(CAPTIONS)
    return (known.index(path.stem) if path.stem in known else len(known), path.name)
