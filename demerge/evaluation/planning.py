"""From options to an evaluation: models, data, feature net, reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from demerge.data import ImageData, load_images
from demerge.data.values import Shape
from demerge.device import resolve_device
from demerge.diffusion.sampling import check_sampling, make_scheduler
from demerge.errors import UsageError
from demerge.evaluation.evaluator import Evaluator
from demerge.evaluation.features.nets import FeatureNet, make_feature_net
from demerge.evaluation.metrics.distances import Reference
from demerge.evaluation.metrics.lpips import load_lpips
from demerge.evaluation.models import Models, ModelSpec, leave_out_reports, specify_models
from demerge.evaluation.options import EvaluationOptions
from demerge.evaluation.report.tables import table_lines
from demerge.evaluation.runner import EvaluationRun, load_model_images
from demerge.evaluation.scores import Kind, Scores, tables_of
from demerge.progress import Progress, silent
from demerge.reporting.html import printable
from demerge.stage import Cost
from demerge.storage.atomic import place_for
from demerge.timesteps import Partition

OTHER_SPLIT = {"test": "train", "train": "test"}


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The scores of all models and of the noise floor."""

    out: Path
    scores: list[Scores]

    def lines(self) -> list[str]:
        """Return a table for each protocol."""
        return table_lines(tables_of(self.scores))

    def document(self) -> dict[str, Any]:
        """Return the scores as JSON values."""
        scores = [score.document() for score in self.scores]
        return {"out": str(self.out / "scores"), "scores": scores}


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationPlan:
    """Models that load, and the real images that they are scored against.

    Attributes:
        losses_on: the images that validation losses are measured on.
        real: the images of the reference.
        floor: real images for the noise floor, if the data has another split.
        reports: folders of demerge's own plots, which were left out.
    """

    models: list[ModelSpec]
    base: ModelSpec | None
    losses_on: ImageData = field(repr=False)
    real: ImageData = field(repr=False)
    floor: ImageData | None = field(repr=False)
    partition: Partition | None
    net: FeatureNet
    options: EvaluationOptions
    out: Path
    reports: list[str]

    def describe(self) -> list[str]:
        """Return which models are scored, and on what."""
        options = self.options
        names = ", ".join(f"{spec.name} ({spec.kind})" for spec in self.models)
        seeds = ", ".join(map(str, options.seeds))
        return [
            f"models: {names}",
            f"{options.num_images:,} images per model and seed (seeds {seeds}),"
            f" scored against {self.real.name} on features {self.net.name}",
            *(f"note: {left_out(folder)}" for folder in self.reports),
        ]

    def cost(self) -> Cost:
        """Return the number of sets of images."""
        seeds = len(self.options.seeds)
        sets = sum(1 if spec.is_images else seeds for spec in self.models)
        return Cost(steps=sets + (self.floor is not None))

    def run(self, progress: Progress = silent) -> EvaluationResult:
        """Score the noise floor, then every model; scores of the same protocol are kept.

        Raises:
            InputError, ComparisonError: if the reference does not suit the feature net.
            NumericalError: if images or losses are not finite.
        """
        options = self.options
        evaluator = Evaluator(
            self.net,
            self._reference(progress),
            sampler=options.sampler,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            perceptual=load_lpips(device=options.device) if options.lpips else None,
        )
        run = EvaluationRun(
            evaluator, self.losses_on, self.out, options, self.base, self.partition, progress
        )
        scores = [] if self.floor is None else [run.score_noise_floor(self.floor)]
        return EvaluationResult(self.out, [*scores, *run.score_models(self.models)])

    def _reference(self, progress: Progress) -> Reference:
        options, net, real = self.options, self.net, self.real
        if options.reference is not None:
            count = options.reference_images
            return Reference.from_npz(options.reference, net, n=count, progress=progress)
        path = self.out / f"reference-{net.name}.safetensors"
        name = printable(f"{real.name} {real.split}")
        images = real.images(range(len(real)))
        return Reference.remembered(path, net, images, name=name, progress=progress)


def left_out(folder: str) -> str:
    """Return the sentence about a folder of demerge's own plots."""
    return f"{folder} holds plots that demerge wrote, not a model. It was left out."


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What all models of a comparison share; `shape` is [C H W]."""

    shape: Shape
    T: int
    requires_text: bool

    def __str__(self) -> str:
        return f"{list(self.shape)} with T = {self.T}{', from text' if self.requires_text else ''}"


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

    Raises:
        UsageError, InputError: if an option is wrong, or a model, the data or weights cannot be
            read.
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
    net = _load_net(options, real)
    return EvaluationPlan(
        specs, control, losses_on, real, floor, partition, net, options, folder, reports
    )


def _shared_facts(
    specs: Sequence[ModelSpec], base: ModelSpec | None, options: EvaluationOptions
) -> ModelFacts | None:
    """Load every model in turn and return what they share; None if there are only image folders."""
    pipelines = [spec for spec in specs if not spec.is_images]
    if base is not None and base not in specs:
        pipelines.append(base)
    first: ModelFacts | None = None
    for spec in pipelines:
        model = spec.load(base)
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
    load = partial(load_images, str(data), skip_broken=options.skip_broken)
    if facts is not None:
        load = partial(load, channels=facts.shape[0], resolution=facts.shape[1])
    losses_on, split, n = load(split=options.split), options.split, options.num_images
    if options.reference is not None:
        return losses_on, losses_on, load(split=split, limit=n)
    other = OTHER_SPLIT.get(split)
    floor = None if other is None else load(split=other, limit=n)
    return losses_on, load(split=split, limit=options.reference_images), floor


def _load_net(options: EvaluationOptions, real: ImageData) -> FeatureNet:
    name = options.features
    if name == "auto":
        name = "digits-cnn" if real.name == "digits" else "random"
    return make_feature_net(
        name,
        preprocess=options.preprocess,
        mixed_precision=options.mixed_precision,
        device=options.device,
    )
