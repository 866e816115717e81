"""Models evaluated in one call: images of each from the same noise, scores, and their report."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from demerge.data import ImageData
from demerge.evaluation.models import Models
from demerge.evaluation.options import EvaluationOptions
from demerge.evaluation.planning import left_out, plan
from demerge.evaluation.report.report import Report
from demerge.evaluation.score_files import load_scores
from demerge.evaluation.scores import Kind
from demerge.progress import Progress, silent


def evaluate(
    models: Models,
    data: str | Path | ImageData,
    options: EvaluationOptions | None = None,
    *,
    base: str | None = None,
    kinds: Mapping[str, Kind] | None = None,
    out: str | Path | None = None,
    title: str = "demerge report",
    progress: Progress = silent,
) -> Report:
    """Draw images of every model from the same noise, score them against real images, and report.

        options = EvaluationOptions(num_images=500)
        report = evaluate({"base": "digits-base", "ties": run / "ties"}, "digits", options)
        report.table, report.plot(), report.contact_sheet(), report.verdict, report.html

    Args:
        models: names and models: paths, ids, or a `Diffusion` in memory; or a list of paths.
        data: real images: a source, whose other split gives the noise floor, or `ImageData`.
        base: name, path or id of the base; else the first pipeline that demerge did not make.
        kinds: what a model of this name is, if no record says so, for example
            {"mine": "merge", "control": "joint"}.
        out: a folder that keeps the scores, so that the same call resumes; else nothing is kept.

    Raises:
        UsageError, InputError: if an option is wrong, or a model, the data or weights cannot be
            read.
        NumericalError: if images or losses are not finite.
    """
    with ExitStack() as stack:
        folder = Path(out or stack.enter_context(TemporaryDirectory(prefix="demerge-")))
        planned = plan(models, data, folder, options, base=base, kinds=kinds)
        scores = planned.run(progress).scores
        contact = load_scores(folder / "scores")[1]
    notes = list(map(left_out, planned.reports))
    return Report.of(scores, title=title, contact=contact, notes=notes)
