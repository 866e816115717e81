"""Scores on disk: SCORES/NAME.seed0.json, and beside it NAME.seed0.png, the first images pixel for pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demerge.errors import InputError
from demerge.evaluation.scores import Scores
from demerge.reporting.images import grid, png
from demerge.storage.atomic import commit_bytes
from demerge.storage.layout import inside

SHOWN = 16


def save_scores(path: Path, scores: Scores, images: Tensor) -> Scores:
    """Write scores and the strip of the first 16 of their images, uint8 [n C H W]; return the scores."""
    strip = png(grid(images[:SHOWN], SHOWN, gap=0))
    commit_bytes(path.with_suffix(".png"), strip)
    scores.save(path)
    return scores


def load_scores(folder: Path | str) -> tuple[list[Scores], dict[str, Tensor]]:
    """Read all scores in a folder, and of each model the strip of its lowest seed as images uint8 [16 C H W].

    Raises:
        InputError: if there are none, or one is damaged or linked out of the folder.
    """
    folder = Path(folder)
    paths = [inside(folder, path) for path in sorted(folder.glob("*.json"))]
    if not paths:
        raise InputError(
            f"{folder}: no scores there", fix="make some with `demerge evaluate ... -o DIR`"
        )
    return read_scores(paths)


def read_scores(paths: list[Path]) -> tuple[list[Scores], dict[str, Tensor]]:
    """Read scores from files, as `load_scores` does."""
    found = sorted(
        ((Scores.load(path), path.with_suffix(".png")) for path in paths),
        key=lambda pair: pair[0].seed,
    )
    strips: dict[str, Path] = {}
    for score, strip in found:
        if score.kind != "real" and strip.is_file():
            inside(strip.parent, strip)
            strips.setdefault(score.model, strip)
    return [score for score, _ in found], {name: read_strip(path) for name, path in strips.items()}


def read_strip(path: Path) -> Tensor:
    """Cut a strip into its 16 images, uint8 [16 3 H W].

    Raises:
        InputError: where the file is no PNG of 16 images side by side.
    """
    try:
        with Image.open(path) as picture:
            pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
        tiles: Tensor = pixels.unflatten(1, (SHOWN, -1)).permute(1, 3, 0, 2)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: not a strip of {SHOWN} images: {error}", fix="evaluate again"
        ) from error
    return tiles
