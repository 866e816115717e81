"""The results in a run folder: scores with a strip of images each, conflict plots, commands.

SCORES/NAME.seed0.json, and next to it the model's first 16 images, NAME.seed0.png.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demerge.errors import InputError, UsageError
from demerge.evaluation.scores import MAKE_SCORES, Scores
from demerge.reporting.html import PageFigure
from demerge.reporting.images import grid, png
from demerge.storage.atomic import commit_bytes
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
SHOWN = 16


def save_scores(path: str | Path, scores: Scores, images: Tensor) -> Scores:
    """Write scores and the strip of the first 16 images, uint8 [n C H W]; return the scores."""
    commit_bytes(Path(path).with_suffix(".png"), png(grid(images[:SHOWN], SHOWN, gap=0)))
    scores.save(path)
    return scores


def load_scores(folder: str | Path) -> tuple[list[Scores], dict[str, Tensor]]:
    """Read all scores in a folder, and each model's strip of its lowest seed, uint8 [16 C H W].

    Raises:
        InputError: if there are none, or one is damaged or linked out of the folder.
    """
    folder = Path(folder)
    paths = [inside(folder, path) for path in sorted(folder.glob("*.json"))]
    if not paths:
        raise InputError(f"{folder}: no scores there", fix=MAKE_SCORES)
    return read_scores(paths)


def read_scores(paths: Sequence[str | Path]) -> tuple[list[Scores], dict[str, Tensor]]:
    """Read scores from files, as `load_scores` does."""
    pairs = [(Scores.load(path), Path(path).with_suffix(".png")) for path in paths]
    pairs.sort(key=lambda pair: pair[0].seed)
    strips: dict[str, Tensor] = {}
    for score, strip in pairs:
        if score.kind != "real" and score.model not in strips and strip.is_file():
            inside(strip.parent, strip)
            strips[score.model] = read_strip(strip)
    return [score for score, _ in pairs], strips


def read_strip(path: str | Path) -> Tensor:
    """Cut a strip into its 16 images, uint8 [16 3 H W]."""
    try:
        with Image.open(path) as picture:
            pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
        tiles: Tensor = pixels.unflatten(1, (SHOWN, -1)).permute(1, 3, 0, 2)
    except (OSError, ValueError, RuntimeError) as error:
        what = f"{path}: not a strip of {SHOWN} images: {error}"
        raise InputError(what, fix="remove it and run `demerge evaluate` again") from error
    return tiles


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
    order = {name: i for i, name in enumerate(CAPTIONS)}
    files.sort(key=lambda path: (order.get(path.stem, len(order)), path.name))
    plots = [path for path in files if not path.name.endswith(DARK)]
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
