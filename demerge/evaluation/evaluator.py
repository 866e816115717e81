"""The judge: everything about an evaluation that is the same for all its models.

    judge = Evaluator(net, reference, sampler="ddim", steps=50, perceptual=load_lpips())
    floor = judge.noise_floor(other_real_images, n=2000)
    scores = judge.score("ties", images, seed=0, kind="merge", base=base_images)

LPIPS is taken on the first `perceptual_images` of a model's images: `drift` is the mean LPIPS between the base's image and the
model's image from the same noise, `diversity` the mean over pairs of the model's images.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from demerge.errors import UsageError
from demerge.evaluation.features.nets import FeatureNet, Progress
from demerge.evaluation.metrics.lpips import LPIPS, diversity, embeddings
from demerge.evaluation.metrics.range_losses import RangeLosses
from demerge.evaluation.metrics.reference import Reference, evaluate_images, images_sha256
from demerge.evaluation.scores import Kind, Protocol, Scores


@dataclass(frozen=True, slots=True, eq=False)
class Evaluator:
    """A feature net, a reference and, for LPIPS, AlexNet; with the sampler that makes the images."""

    net: FeatureNet = field(repr=False)
    reference: Reference = field(repr=False)
    sampler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 1.0
    perceptual: LPIPS | None = field(default=None, repr=False)
    perceptual_images: int = 200

    def protocol(self, n: int) -> Protocol:
        """The protocol of scores on n images."""
        perceptual = (
            ""
            if self.perceptual is None
            else f"{self.perceptual.protocol}, first {self.perceptual_images} images"
        )
        return Protocol(
            **self.net.protocol,
            distance=self.net.distance_name,
            dim=self.net.dim,
            num_images=n,
            reference=self.reference.name,
            reference_n=self.reference.n,
            reference_sha256=self.reference.fingerprint,
            sampler=self.sampler,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            perceptual=perceptual,
        )

    def score(
        self,
        model: str,
        images: Tensor,
        *,
        seed: int,
        kind: Kind = "model",
        base: Tensor | None = None,
        model_sha256: str = "",
        losses: RangeLosses | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Score a model's images, uint8 [n C H W]; `base` holds the base's images from the same noise.

        Raises:
            UsageError: where the base's images have another shape.
            ComparisonError: where the reference was made with another feature net.
        """
        metrics = evaluate_images(images, self.reference, self.net, progress=progress)
        metrics |= self._perceptual(images, base)
        digest = images_sha256(images)
        return Scores(
            model, metrics, self.protocol(len(images)), digest, seed, kind, model_sha256, losses
        )

    def of_real(self) -> Evaluator:
        """The same judge, for real images."""
        return replace(self, sampler="none (real images)", steps=0, guidance_scale=1.0)

    def of_folder(self) -> Evaluator:
        """The same judge, for images that others made."""
        return replace(self, sampler="unknown (folder of images)", steps=0, guidance_scale=1.0)

    def noise_floor(
        self, images: Tensor, *, n: int, name: str = "real images", progress: Progress | None = None
    ) -> Scores:
        """Score n real images, disjoint from the reference's: what a perfect model would score.

        Where there are fewer than n such images, all are taken, and the protocol of the result says how many.
        """
        return self.of_real().score(name, images[:n], seed=0, kind="real", progress=progress)

    def _perceptual(self, images: Tensor, base: Tensor | None) -> dict[str, float]:
        if self.perceptual is None:
            return {}
        first = images[: self.perceptual_images]
        own = embeddings(self.perceptual, first)
        result = {"diversity": diversity(own)}
        if base is None:
            return result
        if base[: len(first)].shape != first.shape:
            raise UsageError(
                f"the base's images are {list(base.shape)}, the model's {list(images.shape)}",
                fix="draw alike",
            )
        theirs = embeddings(self.perceptual, base[: len(first)])
        return result | {"drift": float((own - theirs).square().sum(1).mean())}
