"""The samples that gradients are measured on: x0, noise and timesteps, by bin and group.

Draws (x0, eps, position of t in its bin) are shared between the bins of a group, never between
groups. Differences between bins are then not those of their samples, and the statistic that pairs
different groups stays unbiased (similarity.py). Images are drawn with replacement: the estimated
mean gradient is the one over the data set, which a base was trained for. Positions are stratified:
of B draws, draw b lies in [b/B, (b+1)/B) of its bin. With `antithetic`, B/2 draws are each used
with eps and -eps, which removes the noise that is odd in eps and doubles what is even. Every draw
is a function of (seed, its key) alone, and no key depends on how many groups there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from demerge.conflict import MAX_CELLS
from demerge.data import ImageData
from demerge.diffusion.conditioning import Condition, rows, stack
from demerge.diffusion.model import Diffusion
from demerge.randomness import normal, uniform
from demerge.timesteps import Partition, TimestepRange

TRIALS = 4  # of each kind of noise, in the pilot that chooses between them


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """B samples."""

    images: list[int]  # their indices in the data set
    x0: Tensor  # [B *]
    condition: Condition  # what the denoiser is given besides
    noise: Tensor  # [B *]
    position: Tensor  # of the timestep in a range, in [0, 1), [B]

    def loss(self, model: Diffusion, span: TimestepRange) -> Tensor:
        """Return the mean loss [] at the timesteps of a range."""
        t = model.timesteps(span, self.position).to(model.device)
        return model.loss(self.x0, self.noise, t, self.condition).mean()

    def select(self, samples: slice) -> Draw:
        """Return some of the samples."""
        condition = rows(self.condition, samples)
        x0, noise, position = self.x0[samples], self.noise[samples], self.position[samples]
        return Draw(self.images[samples], x0, condition, noise, position)


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """The draws of a measurement on a partition into N bins."""

    model: Diffusion
    data: ImageData
    bins: Partition
    batch_size: int
    seed: int
    shared: bool
    antithetic: bool | Sequence[bool]  # noise with its opposite, for all bins or for each

    def group(self, m: int) -> Iterator[Draw]:
        """Yield the draw of each bin of group m."""
        kinds = self.antithetic
        if isinstance(kinds, bool):
            kinds = [kinds] * len(self.bins)
        shared = {kind: self._draw(m, kind) for kind in set(kinds)} if self.shared else {}
        for i, kind in enumerate(kinds):
            yield shared[kind] if self.shared else self._draw(MAX_CELLS * (1 + i) + m, kind)

    def pilot(self) -> Iterator[Draw]:
        """Yield a draw for each bin that no group has; plain if each bin has its own kind."""
        for i in range(len(self.bins)):
            yield self._draw(MAX_CELLS * (1 + len(self.bins)) + i, self.antithetic is True)

    def trial(self, i: int, j: int) -> tuple[Draw, Draw]:
        """Return trial j of the noise in bin i: two samples, and one with its opposite noise."""
        key = MAX_CELLS * (2 + len(self.bins) + i) + j
        return self._draw(key, False, 2), self._draw(key, True, 2)

    def _draw(self, key: int, antithetic: bool, size: int | None = None) -> Draw:
        return draw(self.model, self.data, key, size or self.batch_size, self.seed, antithetic)


def draw(model: Diffusion, data: ImageData, key: int, B: int, seed: int, antithetic: bool) -> Draw:
    """Return the B samples of one key."""
    n = B // 2 if antithetic else B
    samples = range(n)
    shares = uniform(seed, "analysis-image", samples=samples, step=key)
    images = (shares * len(data)).long().tolist()
    x0, condition = model.encode_from(data, images)
    noise = normal(model.sample_shape, seed, "analysis-noise", samples=samples, step=key)
    noise = noise.to(model.device)
    position = (torch.arange(n) + uniform(seed, "analysis-t", samples=samples, step=key)) / n
    if not antithetic:
        return Draw(images, x0, condition, noise, position)
    noise = torch.cat([noise, -noise])
    twice = stack(condition, condition)
    return Draw(2 * images, torch.cat([x0] * 2), twice, noise, torch.cat([position] * 2))
