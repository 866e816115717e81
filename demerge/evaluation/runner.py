"""The loop that scores models: every entrant on every sampling seed, by one judge, on common noise.

Scores are written as they are made. A score that is there already, of the same model under the same protocol, is kept, so that
the same command again goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from demerge.data import ImageData, load_images
from demerge.data.values import Shape
from demerge.diffusion.model import Diffusion
from demerge.diffusion.sampling import sample
from demerge.evaluation.evaluator import Evaluator
from demerge.evaluation.features.nets import Progress
from demerge.evaluation.metrics.range_losses import RangeLosses, range_losses
from demerge.evaluation.metrics.reference import images_sha256
from demerge.evaluation.models import ModelSpec
from demerge.evaluation.score_files import save_scores
from demerge.evaluation.scores import Scores
from demerge.reporting.html import printable
from demerge.timesteps import Partition


def pictures(folder: str, shape: Shape, n: int) -> ImageData:
    """Return n images of a folder in the shape [C H W] of the data."""
    channels, height, _ = shape
    return load_images(folder, resolution=height, channels=channels, limit=n)


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationRun:
    """What every entrant goes through.

    Losses are measured on `data` over the ranges of `partition`, if there is one. The images of the model `base` from the
    same noise are drawn for LPIPS drift, if there is a base. Scores go to OUT/scores.
    """

    judge: Evaluator
    data: ImageData = field(repr=False)
    out: Path
    num_images: int
    seeds: Sequence[int]
    base: ModelSpec | None = None
    partition: Partition | None = None
    loss_samples: int = 512
    batch_size: int = 64
    device: str = "cpu"
    progress: Progress | None = None
    _base_images: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def run(self, entrants: Sequence[ModelSpec]) -> Iterator[Scores]:
        """Score every entrant and yield the scores as they come.

        Raises:
            InputError: where a model or a folder of images cannot be read.
            UsageError: where a model cannot be sampled with these options.
            NumericalError: where images or losses are not finite.
        """
        for entrant in entrants:
            yield from (
                self._score_folder(entrant) if entrant.is_images else self._score_model(entrant)
            )

    def noise_floor(self, real: ImageData) -> Scores:
        """Score real images that are disjoint from the reference's."""
        images = real.images(range(min(len(real), self.num_images)))
        place = self.out / "scores" / "real.json"
        if place.is_file():
            done = Scores.load(place)
            if done.images == images_sha256(
                images
            ) and done.protocol == self.judge.of_real().protocol(len(images)):
                return done
        name = printable(f"{real.name} {real.split}")
        scores = self.judge.noise_floor(
            images, n=self.num_images, name=name, progress=self.progress
        )
        return save_scores(place, scores, images)

    def _score_model(self, entrant: ModelSpec) -> Iterator[Scores]:
        model = entrant.load(self.base, self.device)
        digest, losses = model.fingerprint, None
        for seed in self.seeds:
            place = self.out / "scores" / f"{entrant.slug}.seed{seed}.json"
            done = self._done(place, entrant, digest)
            if done is not None:
                yield done
                continue
            losses = losses or self._losses(model)
            images = self._draw(model, seed, self.num_images, entrant.name)
            if entrant == self.base and self.num_images <= self.judge.perceptual_images:
                self._base_images[seed] = images
            scores = self.judge.score(
                entrant.name,
                images,
                seed=seed,
                kind=entrant.kind,
                base=self._images_of_base(seed),
                model_sha256=digest,
                losses=losses,
                progress=self.progress,
            )
            yield save_scores(place, scores, images)

    def _score_folder(self, entrant: ModelSpec) -> Iterator[Scores]:
        data = pictures(entrant.source, self.data.shape, self.num_images)
        images = data.images(range(len(data)))
        scores = self.judge.of_folder().score(entrant.name, images, seed=0, progress=self.progress)
        yield save_scores(self.out / "scores" / f"{entrant.slug}.json", scores, images)

    def _draw(self, model: Diffusion, seed: int, n: int, name: str) -> Tensor:
        def progress(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(done, total, f"{name}, seed {seed}: images")

        return sample(
            model,
            n,
            seed=seed,
            steps=self.judge.steps,
            sampler=self.judge.sampler,
            guidance_scale=self.judge.guidance_scale,
            batch_size=self.batch_size,
            captions=self.data.captions if model.requires_text else None,
            progress=progress,
        )

    def _images_of_base(self, seed: int) -> Tensor | None:
        if self.base is None or self.judge.perceptual is None:
            return None
        if seed not in self._base_images:
            count = min(self.num_images, self.judge.perceptual_images)
            base = self.base.load(device=self.device)
            self._base_images[seed] = self._draw(base, seed, count, "base")
        return self._base_images[seed]

    def _losses(self, model: Diffusion) -> RangeLosses | None:
        if self.partition is None:
            return None
        samples, batch = self.loss_samples, self.batch_size
        return range_losses(
            model,
            self.data,
            self.partition,
            samples=samples,
            batch_size=batch,
            progress=self.progress,
        )

    def _done(self, place: Path, entrant: ModelSpec, digest: str) -> Scores | None:
        if not place.is_file():
            return None
        scores = Scores.load(place)
        ranges = scores.losses.ranges if scores.losses else ()
        same = (scores.protocol, scores.model_sha256, scores.kind, scores.model, ranges) == (
            self.judge.protocol(self.num_images),
            digest,
            entrant.kind,
            entrant.name,
            tuple(map(str, self.partition or ())),
        )
        return scores if same else None
