"""What `compare` finds in a run folder: scores, contact strips, plots of conflict, the commands."""

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
    "heatmap": "Similarity of the gradients of two timesteps on the base; above the diagonal its standard error.",
    "similarity": "How similarity falls with the distance between timesteps.",
    "curve": "Share of the conflict that each number of ranges resolves, for three ways to cut.",
    "support": "How often cuts fall at each place when the groups of samples are resampled.",
    "strength": "Strength of the mean gradient, and how many samples its noise is worth.",
}
DARK = ".dark.svg"


class Commands(Record):
    """A commands.json: the command lines that made a run."""

    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """What a report is made of, and the folder it belongs to."""

    folder: Path
    scores: list[Scores]
    contact: Mapping[str, Tensor]
    figures: tuple[PageFigure, ...]
    commands: tuple[str, ...]
    notes: tuple[str, ...] = ()


def gather(runs: Sequence[Path]) -> Findings:
    """Read one run folder, or score files. A link in a run folder that leads out of it is not followed.

    Raises:
        InputError: if a path is missing or holds no scores, or a score is linked out of the run folder.
        UsageError: if folders and files are mixed.
    """
    for path in runs:
        if not path.exists():
            raise InputError(
                f"{path}: no such file or folder", fix="name a run folder or score files"
            )
    if len(runs) == 1 and runs[0].is_dir():
        return _gather_run(runs[0])
    if any(path.is_dir() for path in runs):
        raise UsageError(
            "several paths, and some are folders", fix="name one run folder, or score files alone"
        )
    scores, contact = read_scores(list(runs))
    return Findings(runs[0].parent, scores, contact, (), ())


def _gather_run(run: Path) -> Findings:
    folder = run / "scores" if (run / "scores").is_dir() else run
    inside(run, folder)
    scores, contact = load_scores(folder)
    plots = sorted(
        (p for f in (run, run / "conflict") for p in f.glob("*.svg") if not p.name.endswith(DARK)),
        key=_order,
    )
    linked = [path for path in [*plots, run / "commands.json"] if not _lies_inside(run, path)]
    figures = tuple(_exhibit(run, path) for path in plots if path not in linked)
    commands = () if run / "commands.json" in linked else _commands(run / "commands.json")
    notes = tuple(
        f"{path.relative_to(run)} is a link out of the run and was left out." for path in linked
    )
    return Findings(run, scores, contact, figures, commands, notes)


def _exhibit(run: Path, plot: Path) -> PageFigure:
    """Read a plot, and next to it, as `demerge analyze` leaves it, the same for dark pages."""
    dark = plot.with_suffix(DARK)
    known = dark.is_file() and _lies_inside(run, dark)
    return PageFigure(
        _caption(plot.stem), plot.read_bytes(), dark=dark.read_bytes() if known else None
    )


def _lies_inside(run: Path, path: Path) -> bool:
    try:
        return bool(inside(run, path))
    except InputError:
        return False


def _order(path: Path) -> tuple[int, str]:
    known = list(CAPTIONS)
    return (known.index(path.stem) if path.stem in known else len(known), path.name)


def _caption(stem: str) -> str:
    return CAPTIONS.get(stem, stem.replace("_", " ").replace("-", " "))


def _commands(path: Path) -> tuple[str, ...]:
    """Read the command lines that `demerge demo` leaves in its run folder, where there is one."""
    if not path.is_file():
        return ()
    return read_record(path, Commands, fix="remove it").commands
