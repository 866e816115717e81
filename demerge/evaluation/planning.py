"""From options to an evaluation: models, data, feature net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from demerge.data import ImageData, load_images
from demerge.data.values import Shape
from demerge.device import resolve_device
from demerge.diffusion.sampling import check_sampling, make_scheduler
from demerge.errors import UsageError
from demerge.evaluation.features.nets import make_feature_net
from demerge.evaluation.models import Models, ModelSpec, leave_out_reports, specify_models
from demerge.evaluation.options import EvaluationOptions
from demerge.evaluation.results import load_scores
from demerge.evaluation.runner import EvaluationPlan, load_model_images
from demerge.evaluation.scores import Kind
from demerge.progress import Progress, silent
from demerge.storage.atomic import place_for
from demerge.timesteps import Partition

if TYPE_CHECKING:
    from demerge.evaluation.report.report import Report

OTHER_SPLIT = {"test": "train", "train": "test"}


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
    from demerge.evaluation.report.report import Report

    with ExitStack() as stack:
        folder = Path(out or stack.enter_context(TemporaryDirectory(prefix="demerge-")))
        planned = plan(models, data, folder, options, base=base, kinds=kinds)
        scores = planned.run(progress).scores
        contact = load_scores(folder / "scores")[1]
    return Report.of(scores, title=title, contact=contact, notes=planned.notes)


def plan(
    models: Models,
    data: str | Path | ImageData,
    out: str | Path,
    options: EvaluationOptions | None = None,
    *,
    base: str | None = None,
    kinds: Mapping[str, Kind] | None = None,
) -> EvaluationPlan:
    """Load every model once, so that none is found missing later; then data and feature net.

    See `evaluate`.
    """
    options = options or EvaluationOptions()
    options = replace(options, device=resolve_device(options.device))
    folder = place_for(out)
    models, reports = leave_out_reports(models)
    specs = specify_models(models, base, kinds)
    control = next((spec for spec in specs if spec.kind == "base"), None)
    if control is None and base is not None:
        control = ModelSpec("base", "base", base)
    facts = _shared_facts(specs, control, options)
    partition = None
    if facts is not None and options.ranges != "none":
        partition = Partition.parse(options.ranges, facts.T, also="none")
    losses_on, real, floor = _load_data(data, options, facts)
    if facts is not None and facts.requires_text and losses_on.captions is None:
        fix = "add a metadata.jsonl with file_name and text, or a NAME.txt next to each image"
        raise UsageError("the models take text, and the data has no captions", fix=fix)
    for spec in specs:
        if spec.is_images:
            load_model_images(spec.source, losses_on.shape, options.num_images)
    features = options.features
    if features == "auto":
        features = "digits-cnn" if real.name == "digits" else "random"
    net = make_feature_net(
        features,
        preprocess=options.preprocess,
        mixed_precision=options.features_precision,
        device=options.device,
    )
    notes = [f"{r} holds plots that demerge wrote, not a model. It was left out." for r in reports]
    return EvaluationPlan(
        specs, control, losses_on, real, floor, partition, net, options, folder, notes
    )


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What all models of a comparison share; `shape` is [C H W]."""

    shape: Shape
    T: int
    requires_text: bool

    def __str__(self) -> str:
        return f"{list(self.shape)} with T = {self.T}{', from text' if self.requires_text else ''}"


def _shared_facts(
    specs: Sequence[ModelSpec], base: ModelSpec | None, options: EvaluationOptions
) -> ModelFacts | None:
    """Load every model in turn and return what they share; None if there are only image folders."""
    pipelines = [spec for spec in specs if not spec.is_images]
    if base is not None and base not in specs:
        pipelines.append(base)
    first: ModelFacts | None = None
    for spec in pipelines:
        model = spec.load(base, resolution=options.resolution)
        check_sampling(model, options, [""])
        make_scheduler(model, options.steps, options.sampler)
        facts = ModelFacts(model.image_shape, model.T, model.requires_text)
        first = first or facts
        if facts != first:
            what = f"{spec.name} makes images {facts}, {pipelines[0].name} images {first}"
            raise UsageError(what, fix="compare models of one shape and one T")
    return first


def _load_data(
    data: str | Path | ImageData, options: EvaluationOptions, facts: ModelFacts | None
) -> tuple[ImageData, ImageData, ImageData | None]:
    """Return the images of the losses, of the reference, and of the noise floor.

    Against statistics of `reference`, the images of the split itself are the noise floor.
    """
    if isinstance(data, ImageData):
        return data, data, None
    load = partial(load_images, data, skip_broken=options.skip_broken)
    if facts is not None:
        load = partial(load, channels=facts.shape[0], resolution=facts.shape[1])
    losses_on, split, n = load(split=options.split), options.split, options.num_images
    if options.reference is not None:
        return losses_on, losses_on, load(split=split, limit=n)
    other = OTHER_SPLIT.get(split)
    floor = None if other is None else load(split=other, limit=n)
    return losses_on, load(split=split, limit=options.reference_images), floor
