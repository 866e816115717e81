"""What the gradients are measured on: samples x0, noise and timesteps, by bin of timesteps and group of samples.

Draws (x0, eps, position of t in its bin) are shared between the bins of a group, never between groups: differences between
bins are then not those of their samples, and the statistic that pairs different groups stays unbiased (see similarity.py).
Images are drawn with replacement: the mean gradient estimated is the one over the data set, for which a base was trained.
Positions are stratified: of B draws, draw b lies in [b/B, (b+1)/B) of its bin. With `antithetic`, B/2 draws are each taken
with eps and -eps, which takes away the noise that is odd in eps, and doubles what is even. Every draw is a function of (seed,
its key) alone, and no key depends on how many groups there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from demerge.conflict import MAX_CELLS
from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.randomness import normal, uniform
from demerge.timesteps import Partition, TimestepRange


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """B samples: their `images` in the data set, x0 and noise [B *], the condition, and positions in [0, 1) [B]."""

    images: list[int]
    x0: Tensor
    condition: Tensor | None
    noise: Tensor
    position: Tensor

    def timesteps(self, span: TimestepRange) -> Tensor:
        """Return the timesteps [B] at the positions in a range; each t of the range covers an equal share."""
        return span.start + (self.position * len(span)).long().clamp(max=len(span) - 1)

    def loss(self, model: Diffusion, span: TimestepRange) -> Tensor:
        """Return the mean loss [] at the timesteps of a range."""
        return model.loss(
            self.x0, self.noise, self.timesteps(span).to(model.device), self.condition
        ).mean()

    def only(self, b: int) -> Draw:
        """Return sample b alone."""
        keep = slice(b, b + 1)
        condition = None if self.condition is None else self.condition[keep]
        return Draw(
            self.images[keep], self.x0[keep], condition, self.noise[keep], self.position[keep]
        )


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """The draws of a measurement on a partition into N bins.

    Attributes:
        antithetic: whether noise comes with its opposite, for all bins or for each.
    """

    model: Diffusion
    data: ImageData
    bins: Partition
    batch_size: int
    seed: int
    shared: bool
    antithetic: bool | Sequence[bool]

    def group(self, m: int) -> Iterator[Draw]:
        """Yield the draw of each bin of group m."""
        pairs = (
            [self.antithetic] * len(self.bins)
            if isinstance(self.antithetic, bool)
            else self.antithetic
        )
        shared = {paired: self._of(m, paired) for paired in set(pairs)} if self.shared else {}
        for i, paired in enumerate(pairs):
            yield shared[paired] if self.shared else self._of(MAX_CELLS * (1 + i) + m, paired)

    def pilot(self) -> Iterator[Draw]:
        """Yield a draw for each bin that no group has; plain where each bin has its own kind of noise."""
        for i in range(len(self.bins)):
            yield self._of(MAX_CELLS * (1 + len(self.bins)) + i, self.antithetic is True)

    def trial(self, i: int, j: int) -> tuple[Draw, Draw]:
        """Return two samples of bin i that no group has, for trial j of the noise, and one of them with its opposite noise."""
        key = MAX_CELLS * (2 + len(self.bins) + i) + j
        plain, paired = (
            draw(self.model, self.data, key, 2, self.seed, antithetic)
            for antithetic in (False, True)
        )
        return plain, paired

    def _of(self, key: int, antithetic: bool) -> Draw:
        return draw(self.model, self.data, key, self.batch_size, self.seed, antithetic)


def draw(model: Diffusion, data: ImageData, key: int, B: int, seed: int, antithetic: bool) -> Draw:
    """Return the B samples of one key."""
    n = B // 2 if antithetic else B
    samples = range(n)
    chosen = (
        (uniform(seed, "analysis-image", samples=samples, step=key) * len(data)).long().tolist()
    )
    x0, condition = model.encode_from(data, chosen)
    noise = normal(model.sample_shape, seed, "analysis-noise", samples=samples, step=key).to(
        model.device
    )
    position = (torch.arange(n) + uniform(seed, "analysis-t", samples=samples, step=key)) / n
    if not antithetic:
        return Draw(chosen, x0, condition, noise, position)
    twice = None if condition is None else torch.cat([condition, condition])
    return Draw(
        2 * chosen,
        torch.cat([x0, x0]),
        twice,
        torch.cat([noise, -noise]),
        torch.cat([position, position]),
    )
