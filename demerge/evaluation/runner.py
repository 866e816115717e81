"""The stage `demerge evaluate`: every model on every sampling seed, on common noise.

Scores are written as they are made. A score of the same model under the same protocol is kept if it
exists, so that the same command again resumes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from demerge.data import ImageData, load_images
from demerge.data.values import Shape
from demerge.diffusion.model import Diffusion
from demerge.diffusion.sampling import sample
from demerge.evaluation.evaluator import FOLDER, REAL, Evaluator
from demerge.evaluation.features.nets import FeatureNet
from demerge.evaluation.metrics.distances import Reference, hash_images
from demerge.evaluation.metrics.lpips import load_lpips
from demerge.evaluation.metrics.range_losses import RangeLosses, describe_draws, range_losses
from demerge.evaluation.models import ModelSpec
from demerge.evaluation.options import EvaluationOptions
from demerge.evaluation.report.range_table import range_losses_of
from demerge.evaluation.report.tables import table_lines
from demerge.evaluation.report.verdict import Findings
from demerge.evaluation.results import save_scores
from demerge.evaluation.scores import Scores, tables_of
from demerge.progress import Progress, silent
from demerge.reporting.html import printable
from demerge.stage import Cost
from demerge.timesteps import Partition

MOST_ON_DEVICE = 1 << 30  # bytes of images that go from the sampler to the features directly


def load_model_images(folder: str | Path, shape: Shape, n: int) -> ImageData:
    """Return n images of a folder in the shape [C H W] of the data."""
    return load_images(folder, resolution=shape[1], channels=shape[0], limit=n)


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
        tables = map(Findings.of, tables_of(self.scores))
        losses = [line.document() for table in tables for line in range_losses_of(table)]
        return {"out": str(self.out / "scores"), "scores": scores, "losses": losses}


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationPlan:
    """Models that load, and the real images that they are scored against.

    Attributes:
        base: the model whose images from the same noise give the LPIPS drift.
        losses_on: the images that validation losses are measured on, over the ranges of
            `partition`, if there is one.
        real: the images of the reference.
        floor: real images for the noise floor, if the data has another split.
        notes: sentences about folders that were left out.
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
    notes: list[str]

    def describe(self) -> list[str]:
        """Return which models are scored, and on what."""
        names = ", ".join(f"{spec.name} ({spec.kind})" for spec in self.models)
        seeds = ", ".join(map(str, self.options.seeds))
        return [
            f"models: {names}",
            f"{self.options.num_images:,} images per model and seed (seeds {seeds}),"
            f" scored against {self.real.name} on features {self.net.name}",
            *(f"note: {note}" for note in self.notes),
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
            mixed_precision=options.mixed_precision,
            perceptual=load_lpips(device=options.device) if options.lpips else None,
        )
        return EvaluationResult(self.out, list(_Run(self, evaluator, progress).scores()))

    def _reference(self, progress: Progress) -> Reference:
        options, net, real = self.options, self.net, self.real
        if options.reference is not None:
            count = options.reference_images
            return Reference.from_npz(options.reference, net, n=count, progress=progress)
        cache = self.out / f"reference-{net.name}.safetensors"
        images, name = real.images(range(len(real))), _name(real)
        return Reference.from_images(net, images, name=name, cache=cache, progress=progress)


def _name(real: ImageData) -> str:
    return printable(f"{real.name} {real.split}")


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    plan: EvaluationPlan
    evaluator: Evaluator
    progress: Progress
    base_images: dict[int, Tensor] = field(default_factory=dict)

    def scores(self) -> Iterator[Scores]:
        if self.plan.floor is not None:
            yield self._score_real(self.plan.floor)
        for spec in self.plan.models:
            yield from self._score_folder(spec) if spec.is_images else self._score_model(spec)

    def _path(self, name: str) -> Path:
        return self.plan.out / "scores" / f"{name}.json"

    def _score_real(self, real: ImageData) -> Scores:
        """Score real images that are disjoint from the reference's: the noise floor."""
        images = real.images(range(min(len(real), self.plan.options.num_images)))
        path, evaluator = self._path("real"), self.evaluator.of_images(REAL)
        if path.is_file():
            scores, protocol = Scores.load(path), evaluator.protocol(len(images))
            if scores.images == hash_images(images) and scores.protocol == protocol:
                return scores
        scores = evaluator.score(_name(real), images, seed=0, kind="real", progress=self.progress)
        return save_scores(path, scores, images)

    def _score_folder(self, spec: ModelSpec) -> Iterator[Scores]:
        plan, evaluator = self.plan, self.evaluator.of_images(FOLDER)
        data = load_model_images(spec.source, plan.losses_on.shape, plan.options.num_images)
        images = data.images(range(len(data)))
        scores = evaluator.score(spec.name, images, seed=0, progress=self.progress)
        yield save_scores(self._path(spec.slug), scores, images)

    def _score_model(self, spec: ModelSpec) -> Iterator[Scores]:
        plan, options = self.plan, self.plan.options
        model = spec.load(plan.base, options.device, options.resolution)
        digest, losses = model.fingerprint, None
        for seed in options.seeds:
            path = self._path(f"{spec.slug}.seed{seed}")
            scores = self._find_scores(path, spec, digest)
            if scores is not None:
                yield scores
                continue
            losses = losses or self._measure_losses(model)
            images = self._draw(model, seed, options.num_images, spec.name)
            if spec == plan.base and len(images) <= self.evaluator.perceptual_images:
                self.base_images[seed] = images
            scores = self.evaluator.score(
                spec.name,
                images,
                seed=seed,
                kind=spec.kind,
                base=self._images_of_base(seed),
                model_sha256=digest,
                losses=losses,
                progress=self.progress,
            )
            yield save_scores(path, scores, images)

    def _find_scores(self, path: Path, spec: ModelSpec, digest: str) -> Scores | None:
        """Return the scores in a file if they are those of the same model and protocol."""
        if not path.is_file():
            return None
        scores = Scores.load(path)
        plan, own = self.plan, scores.losses or RangeLosses((), ())
        draws = describe_draws(plan.losses_on, plan.options.loss_samples, 0)
        wanted = (tuple(map(str, plan.partition)), draws) if plan.partition else ((), "")
        is_same = (
            scores.protocol == self.evaluator.protocol(self.plan.options.num_images)
            and (scores.model_sha256, scores.kind, scores.model) == (digest, spec.kind, spec.name)
            and (own.ranges, own.draws) == wanted
        )
        return scores if is_same else None

    def _draw(self, model: Diffusion, seed: int, n: int, name: str) -> Tensor:
        captions = self.plan.losses_on.captions if model.requires_text else None
        progress = partial(self.progress, text=f"{name}, seed {seed}: images")
        return sample(
            model,
            n,
            self.plan.options,
            seed=seed,
            captions=captions,
            on_device=n * math.prod(model.image_shape) <= MOST_ON_DEVICE,
            progress=progress,
        )

    def _images_of_base(self, seed: int) -> Tensor | None:
        base, options = self.plan.base, self.plan.options
        if base is None or self.evaluator.perceptual is None:
            return None
        if seed not in self.base_images:
            count = min(options.num_images, self.evaluator.perceptual_images)
            self.base_images[seed] = self._draw(
                base.load(device=options.device, resolution=options.resolution), seed, count, "base"
            )
        return self.base_images[seed]

    def _measure_losses(self, model: Diffusion) -> RangeLosses | None:
        plan, options = self.plan, self.plan.options
        if plan.partition is None:
            return None
        return range_losses(
            model,
            plan.losses_on,
            plan.partition,
            samples=options.loss_samples,
            batch_size=options.batch_size,
            progress=self.progress,
        )
