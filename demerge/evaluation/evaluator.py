"""The evaluator: everything about an evaluation that is the same for all its models.

LPIPS is taken on the first `perceptual_images` of a model's images. `drift` is the mean LPIPS
between the base's image and the model's image from the same noise, `diversity` the mean over pairs
of the model's images.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from demerge.errors import UsageError
from demerge.evaluation.features.nets import FeatureNet
from demerge.evaluation.metrics.distances import Reference, evaluate_images, hash_images
from demerge.evaluation.metrics.lpips import LPIPS, diversity
from demerge.evaluation.metrics.range_losses import RangeLosses
from demerge.evaluation.scores import Kind, Protocol, Scores
from demerge.progress import Progress, silent

REAL = "none (real images)"
FOLDER = "unknown (folder of images)"


@dataclass(frozen=True, slots=True, eq=False)
class Evaluator:
    """A feature net, a reference, AlexNet for LPIPS, and the sampler that makes the images."""

    net: FeatureNet = field(repr=False)
    reference: Reference = field(repr=False)
    sampler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 1.0
    mixed_precision: str = "no"
    perceptual: LPIPS | None = field(default=None, repr=False)
    perceptual_images: int = 200

    def protocol(self, n: int) -> Protocol:
        """Return the protocol of scores on n images."""
        perceptual = ""
        if self.perceptual is not None:
            perceptual = f"{self.perceptual.protocol}, first {self.perceptual_images} images"
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
            mixed_precision=self.mixed_precision,
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
        progress: Progress = silent,
    ) -> Scores:
        """Score a model's images, uint8 [n C H W].

        Args:
            base: the base's images from the same noise.
        """
        metrics = evaluate_images(images, self.reference, self.net, progress=progress)
        metrics |= self._perceptual_metrics(images, base)
        protocol, digest = self.protocol(len(images)), hash_images(images)
        return Scores(model, metrics, protocol, digest, seed, kind, model_sha256, losses)

    def of_images(self, source: str) -> Evaluator:
        """Return the same evaluator for images that are not sampled: `REAL` ones, or of a `FOLDER`.

        Real images that are disjoint from the reference's give the noise floor: what a perfect
        model would score.
        """
        return replace(self, sampler=source, steps=0, guidance_scale=1.0, mixed_precision="no")

    def _perceptual_metrics(self, images: Tensor, base: Tensor | None) -> dict[str, float]:
        if self.perceptual is None:
            return {}
        first = images[: self.perceptual_images]
        own = self.perceptual.embed(first)
        if base is None:
            return {"diversity": diversity(own)}
        if base[: len(first)].shape != first.shape:
            what = f"the base's images are {list(base.shape)}, the model's {list(images.shape)}"
            raise UsageError(what, fix="draw as many images of one shape from both")
        theirs = self.perceptual.embed(base[: len(first)])
        drift = float((own - theirs).square().sum(1).mean())
        return {"diversity": diversity(own), "drift": drift}
