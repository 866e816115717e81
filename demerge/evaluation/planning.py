"""From the words of a command to a contest: data, reference, feature net, judge, entrants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from demerge.data import ImageData, load_images
from demerge.data.values import Shape
from demerge.diffusion.sampling import check_sampling, make_scheduler
from demerge.errors import UsageError
from demerge.evaluation.evaluator import Evaluator
from demerge.evaluation.features.inception import Preprocess
from demerge.evaluation.features.nets import FeatureNet, Progress, feature_net
from demerge.evaluation.metrics.lpips import load_lpips
from demerge.evaluation.metrics.reference import Reference
from demerge.evaluation.models import Models, ModelSpec, entrants, without_reports
from demerge.evaluation.runner import EvaluationRun, pictures
from demerge.evaluation.scores import Kind, Scores
from demerge.reporting.html import printable
from demerge.reprs import stated
from demerge.storage.atomic import place_for
from demerge.timesteps import Partition

OTHER = {"test": "train", "train": "test"}


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What a user says about an evaluation.

    Attributes:
        data: a source of real images, or the images themselves; then they are the reference, and there is no noise floor.
        features: `digits-cnn`, `random`, `inception:PATH`, or `auto`: the digits classifier for `digits`, else `random`.
        reference: an npz with statistics of real images in place of the images of `data`.
        reference_images: at most so many real images; or how many the statistics of `reference` stand for.
        ranges: `uniform:N`, a partition.json or `none`.
    """

    data: str | ImageData
    split: str = "test"
    skip_broken: bool = False
    features: str = "auto"
    preprocess: Preprocess = "clean"
    precision: str = "no"
    num_images: int = 2000
    reference: Path | None = None
    reference_images: int | None = None
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 50
    sampler: str = "ddim"
    guidance_scale: float = 1.0
    ranges: str = "uniform:4"
    loss_samples: int = 512
    lpips: bool = True
    batch_size: int = 64
    device: str = "cpu"

    __repr__ = stated


@dataclass(frozen=True, slots=True)
class Prepared:
    """A contest, who enters it, and real images for the noise floor, if the data has another split.

    Attributes:
        left_out: folders of demerge's own plots, which were named among the models.
    """

    contest: EvaluationRun
    entrants: list[ModelSpec]
    others: ImageData | None
    left_out: list[str]

    def run(self) -> Iterator[Scores]:
        """Score the noise floor, then every entrant."""
        if self.others is not None:
            yield self.contest.noise_floor(self.others)
        yield from self.contest.run(self.entrants)


@dataclass(frozen=True, slots=True)
class Facts:
    """What all models of a comparison share: the shape [C H W] of their images, T, and whether they take text."""

    shape: Shape
    T: int
    requires_text: bool

    def __str__(self) -> str:
        return f"{list(self.shape)} with T = {self.T}{', from text' if self.requires_text else ''}"


def prepare(
    models: Models,
    options: EvaluationOptions,
    out: Path | str,
    *,
    base: str | None = None,
    kinds: Mapping[str, Kind] | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Load what an evaluation needs: every model once, so that none is found missing later; data, reference, nets.

    Raises:
        UsageError, InputError: if an option is wrong or a model, the data or the weights cannot be read.
    """
    out = place_for(out)
    models, left_out = without_reports(models)
    found = entrants(models, base, kinds)
    control = next(
        (e for e in found if e.kind == "base"),
        None if base is None else ModelSpec("base", "base", base),
    )
    facts = _facts(found, control, options)
    partition = (
        None
        if facts is None or options.ranges == "none"
        else Partition.parse(options.ranges, facts.T, also="none")
    )
    data, real, others = _data(options, facts)
    if facts is not None and facts.requires_text and data.captions is None:
        raise UsageError(
            "the models take text and the data has no captions",
            fix="add a metadata.jsonl with file_name and text, or a NAME.txt next to each image",
        )
    for entrant in found:
        if entrant.is_images:
            pictures(entrant.source, data.shape, options.num_images)
    contest = EvaluationRun(
        _judge(options, real, out, progress),
        data,
        out,
        options.num_images,
        tuple(options.seeds),
        base=control,
        partition=partition,
        loss_samples=options.loss_samples,
        batch_size=options.batch_size,
        device=options.device,
        progress=progress,
    )
    return Prepared(contest, found, others, left_out)


def _facts(
    found: Sequence[ModelSpec], base: ModelSpec | None, options: EvaluationOptions
) -> Facts | None:
    """Load every model, one after the other, and return what they share; None if there are image folders alone."""
    known: list[tuple[ModelSpec, Facts]] = []
    pipelines = [e for e in found if not e.is_images]
    for entrant in [*pipelines, *([base] if base is not None and base not in found else [])]:
        model = entrant.load(base)
        n, batch = options.num_images, options.batch_size
        check_sampling(
            model, n, options.steps, options.sampler, batch, [""], options.guidance_scale
        )
        make_scheduler(model, options.steps, options.sampler)
        known.append((entrant, Facts(model.image_shape, model.T, model.requires_text)))
    for entrant, facts in known:
        if facts != known[0][1]:
            what = f"{entrant.name} makes images {facts}, {known[0][0].name} images {known[0][1]}"
            raise UsageError(what, fix="compare models of one shape and one T")
    return known[0][1] if known else None


def _data(
    options: EvaluationOptions, facts: Facts | None
) -> tuple[ImageData, ImageData, ImageData | None]:
    """Return the images that losses are measured on, those of the reference, and those of the noise floor.

    Against statistics of `reference`, the images of the split itself are the noise floor.
    """
    if isinstance(options.data, ImageData):
        return options.data, options.data, None
    load = partial(load_images, options.data, skip_broken=options.skip_broken)
    if facts is not None:
        load = partial(load, channels=facts.shape[0], resolution=facts.shape[1])
    data = load(split=options.split)
    if options.reference is not None:
        return data, data, load(split=options.split, limit=options.num_images)
    others = (
        load(split=OTHER[options.split], limit=options.num_images)
        if options.split in OTHER
        else None
    )
    return data, load(split=options.split, limit=options.reference_images), others


def _judge(
    options: EvaluationOptions, real: ImageData, out: Path, progress: Progress | None
) -> Evaluator:
    spec = (
        options.features
        if options.features != "auto"
        else "digits-cnn"
        if real.name == "digits"
        else "random"
    )
    net = feature_net(
        spec, preprocess=options.preprocess, precision=options.precision, device=options.device
    )
    perceptual = load_lpips(device=options.device) if options.lpips else None
    reference = _reference(options, net, real, out, progress)
    sampling = {
        "sampler": options.sampler,
        "steps": options.steps,
        "guidance_scale": options.guidance_scale,
    }
    return Evaluator(net, reference, perceptual=perceptual, **sampling)  # type: ignore[arg-type]


def _reference(
    options: EvaluationOptions,
    net: FeatureNet,
    real: ImageData,
    out: Path,
    progress: Progress | None,
) -> Reference:
    if options.reference is not None:
        return Reference.from_npz(
            options.reference, net, n=options.reference_images, progress=progress
        )
    images, kept = real.images(range(len(real))), out / f"reference-{net.name}.safetensors"
    return Reference.remembered(
        kept, net, images, name=printable(f"{real.name} {real.split}"), progress=progress
    )


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `0,1,2`.

    Raises:
        UsageError: where this is no list of different seeds >= 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise UsageError(
            f"seeds '{text}' are no list of different numbers", fix="for example 0,1,2"
        )
    return tuple(map(int, parts))
