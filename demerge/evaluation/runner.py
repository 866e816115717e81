"""The loop that scores models: every model on every sampling seed, on common noise.

Scores are written as they are made. A score of the same model under the same protocol is kept if it
exists, so that the same command again resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from demerge.data import ImageData, load_images
from demerge.data.values import Shape
from demerge.diffusion.model import Diffusion
from demerge.diffusion.sampling import sample
from demerge.evaluation.evaluator import Evaluator
from demerge.evaluation.metrics.distances import hash_images
from demerge.evaluation.metrics.range_losses import RangeLosses, range_losses
from demerge.evaluation.models import ModelSpec
from demerge.evaluation.options import EvaluationOptions
from demerge.evaluation.score_files import save_scores
from demerge.evaluation.scores import Scores
from demerge.progress import Progress, silent
from demerge.reporting.html import printable
from demerge.timesteps import Partition


def load_model_images(folder: str | Path, shape: Shape, n: int) -> ImageData:
    """Return n images of a folder in the shape [C H W] of the data."""
    return load_images(str(folder), resolution=shape[1], channels=shape[0], limit=n)


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationRun:
    """What every model goes through.

    Losses are measured on `data` over the ranges of `partition`, if there is one. The images of the
    model `base` from the same noise are drawn for LPIPS drift, if there is a base. Scores go to
    OUT/scores.
    """

    evaluator: Evaluator
    data: ImageData = field(repr=False)
    out: Path
    options: EvaluationOptions
    base: ModelSpec | None = None
    partition: Partition | None = None
    progress: Progress = silent
    _base_images: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def score_models(self, models: Sequence[ModelSpec]) -> Iterator[Scores]:
        """Score every model and yield the scores as they come.

        Raises:
            InputError: if a model or a folder of images cannot be read.
            UsageError: if a model cannot be sampled with these options.
            NumericalError: if images or losses are not finite.
        """
        for spec in models:
            yield from self._score_folder(spec) if spec.is_images else self._score_model(spec)

    def score_noise_floor(self, real: ImageData) -> Scores:
        """Score real images that are disjoint from the reference's."""
        images = real.images(range(min(len(real), self.options.num_images)))
        path, evaluator = self.out / "scores" / "real.json", self.evaluator.of_real()
        if path.is_file():
            scores, protocol = Scores.load(path), evaluator.protocol(len(images))
            if scores.images == hash_images(images) and scores.protocol == protocol:
                return scores
        name = printable(f"{real.name} {real.split}")
        scores = evaluator.score(name, images, seed=0, kind="real", progress=self.progress)
        return save_scores(path, scores, images)

    def _score_model(self, spec: ModelSpec) -> Iterator[Scores]:
        model = spec.load(self.base, self.options.device)
        digest, losses = model.fingerprint, None
        for seed in self.options.seeds:
            path = self.out / "scores" / f"{spec.slug}.seed{seed}.json"
            scores = self._find_scores(path, spec, digest)
            if scores is not None:
                yield scores
                continue
            losses = losses or self._measure_losses(model)
            images = self._draw(model, seed, self.options.num_images, spec.name)
            if spec == self.base and len(images) <= self.evaluator.perceptual_images:
                self._base_images[seed] = images
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

    def _score_folder(self, spec: ModelSpec) -> Iterator[Scores]:
        data = load_model_images(spec.source, self.data.shape, self.options.num_images)
        images = data.images(range(len(data)))
        evaluator = self.evaluator.of_folder()
        scores = evaluator.score(spec.name, images, seed=0, progress=self.progress)
        yield save_scores(self.out / "scores" / f"{spec.slug}.json", scores, images)

    def _draw(self, model: Diffusion, seed: int, n: int, name: str) -> Tensor:
        captions = self.data.captions if model.requires_text else None
        progress = partial(self.progress, text=f"{name}, seed {seed}: images")
        return sample(model, n, self.options, seed=seed, captions=captions, progress=progress)

    def _images_of_base(self, seed: int) -> Tensor | None:
        if self.base is None or self.evaluator.perceptual is None:
            return None
        if seed not in self._base_images:
            count = min(self.options.num_images, self.evaluator.perceptual_images)
            base = self.base.load(device=self.options.device)
            self._base_images[seed] = self._draw(base, seed, count, "base")
        return self._base_images[seed]

    def _measure_losses(self, model: Diffusion) -> RangeLosses | None:
        if self.partition is None:
            return None
        options = self.options
        return range_losses(
            model,
            self.data,
            self.partition,
            samples=options.loss_samples,
            batch_size=options.batch_size,
            progress=self.progress,
        )

    def _find_scores(self, path: Path, spec: ModelSpec, digest: str) -> Scores | None:
        """Return the scores in a file if they are those of the same model and protocol."""
        if not path.is_file():
            return None
        scores = Scores.load(path)
        ranges = scores.losses.ranges if scores.losses else ()
        is_same = (
            scores.protocol == self.evaluator.protocol(self.options.num_images)
            and (scores.model_sha256, scores.kind, scores.model) == (digest, spec.kind, spec.name)
            and ranges == tuple(map(str, self.partition or ()))
        )
        return scores if is_same else None
