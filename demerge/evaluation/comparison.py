"""Models compared in one call: images of each from the same noise, scores, and the report of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from demerge.data import ImageData
from demerge.evaluation.features.nets import Progress
from demerge.evaluation.models import Models
from demerge.evaluation.planning import EvaluationOptions, prepare
from demerge.evaluation.report.report import Report
from demerge.evaluation.score_files import load_scores
from demerge.evaluation.scores import Kind


def compare(
    models: Models,
    data: str | ImageData,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    base: str | None = None,
    kinds: Mapping[str, Kind] | None = None,
    out: Path | str | None = None,
    title: str = "demerge report",
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Draw images of every model from the same noise, score them against real images, and report.

        report = compare({"base": "digits-base", "ties": run / "ties"}, "digits", num_images=500)
        report.table, report.plot(), report.contact_sheet(), report.verdict, report.html

    Args:
        models: names and models: paths, ids, or a `Diffusion` in memory; or a list of paths, as for `demerge evaluate`.
        data: real images: a source, whose other split gives the noise floor, or `ImageData`.
        seeds: sampling seeds; a verdict takes at least three.
        base: the name, path or id of the base; else the first pipeline that demerge did not make.
        kinds: what a model of this name is, if no record says so, for example {"mine": "merge", "control": "joint"}.
        out: a folder that keeps the scores, so that the same call goes on where it stopped; else nothing is kept.
        options: fields of `EvaluationOptions`: num_images, steps, features, lpips, ranges and others.

    Raises:
        UsageError, InputError: if an option is wrong or a model, the data or the weights cannot be read.
        NumericalError: if images or losses are not finite.
    """
    with _folder(out) as folder:
        prepared = prepare(
            models,
            EvaluationOptions(data, seeds=tuple(seeds), **options),
            folder,
            base=base,
            kinds=kinds,
            progress=progress,
        )
        scores = list(prepared.run())
        _, contact = load_scores(folder / "scores")
    notes = [
        f"{name} holds plots that demerge wrote, not a model; it was left out."
        for name in prepared.left_out
    ]
    return Report.of(scores, title=title, contact=contact, notes=notes)


@contextmanager
def _folder(out: Path | str | None) -> Iterator[Path]:
    """Give the folder, or one that is gone afterwards."""
    if out is not None:
        yield Path(out)
        return
    with TemporaryDirectory(prefix="demerge-") as folder:
        yield Path(folder)
