"""Scores on disk: SCORES/NAME.seed0.json, and a strip of the first images, NAME.seed0.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demerge.errors import InputError
from demerge.evaluation.scores import MAKE_SCORES, Scores
from demerge.reporting.images import grid, png
from demerge.storage.atomic import commit_bytes
from demerge.storage.layout import inside

SHOWN = 16


def save_scores(path: Path, scores: Scores, images: Tensor) -> Scores:
    """Write scores and the strip of the first 16 images, uint8 [n C H W]; return the scores."""
    commit_bytes(path.with_suffix(".png"), png(grid(images[:SHOWN], SHOWN, gap=0)))
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
    """Cut a strip into its 16 images, uint8 [16 3 H W].

    Raises:
        InputError: if the file is not a PNG of 16 images side by side.
    """
    try:
        with Image.open(path) as picture:
            pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
        tiles: Tensor = pixels.unflatten(1, (SHOWN, -1)).permute(1, 3, 0, 2)
    except (OSError, ValueError, RuntimeError) as error:
        what = f"{path}: not a strip of {SHOWN} images: {error}"
        raise InputError(what, fix="remove it and run `demerge evaluate` again") from error
    return tiles
