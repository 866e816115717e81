"""Validation loss per range of timesteps, on common random numbers.

    L_r = mean over (x0, t, eps), t in range r, of |y - f(x_t, t, c)|^2

Sample j of range r is the same (image, t, eps) for every model: image, t and noise are functions of
(seed, r, j). So the difference of two models is far surer than either loss, and its interval comes
from blocks of paired samples. The t of a range follow the golden-ratio sequence,
t_j = lo + floor(frac(j phi + u_j / 512) (hi - lo)), so that every block sees the whole range and
the variance that t itself makes is mostly gone.

Ranges differ in loss by orders of magnitude: show changes relative to the base, never sums over
ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log10, nan, sqrt
from typing import TYPE_CHECKING

import torch
from scipy.special import stdtrit
from torch import Tensor

from demerge.data import ImageData
from demerge.diffusion.numerics import fitting_threads
from demerge.errors import NumericalError, UsageError
from demerge.progress import Progress, silent
from demerge.randomness import normal, permutation, uniform
from demerge.timesteps import Partition, TimestepRange

if TYPE_CHECKING:
    from demerge.diffusion.model import Diffusion

BLOCKS = 16
LEVEL = 0.95
GOLDEN = (5**0.5 - 1) / 2
JITTER = 512


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over blocks, its standard error, and the ends of its 95 % interval.

    All but the mean are NaN for one block.
    """

    value: float
    se: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, residuals: Tensor) -> Interval:
        """Make one from the blocks' residuals [B], by Student's t with B - 1 degrees of freedom."""
        B = len(residuals)
        se = float(residuals.std()) / sqrt(B) if B > 1 else nan
        half = se * float(stdtrit(max(1, B - 1), (1 + LEVEL) / 2))
        return cls(value, se, value - half, value + half)

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return self.high - self.value

    @property
    def is_certain(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return abs(self.value) > self.half

    def __str__(self) -> str:
        if not self.half > 0:
            return f"{self.value:.4g}"
        decimals = max(0, 1 - floor(log10(self.half)))
        return f"{self.value:.{decimals}f} ± {self.half:.{decimals}f}"

    def percent(self) -> str:
        """Return a share as a change in percent: `-1.24 ± 0.31 %`."""
        return f"{100 * self.value:+.2f} ± {100 * self.half:.2f} %"


@dataclass(frozen=True, slots=True)
class RangeLosses:
    """Mean losses of blocks, `blocks[r][b]`; block b has the same samples for all models.

    Attributes:
        draws: which images, timesteps and noise: data, seed and number; empty in older files.
    """

    ranges: tuple[str, ...]
    blocks: tuple[tuple[float, ...], ...]
    draws: str = ""

    def __post_init__(self) -> None:
        if len(self.ranges) != len(self.blocks) or len({len(row) for row in self.blocks}) > 1:
            what = f"{len(self.ranges)} ranges and {len(self.blocks)} rows of losses do not fit"
            raise UsageError(what, fix="give a row for each range")

    def __repr__(self) -> str:
        means = ", ".join(f"{name}: {loss:.4g}" for name, loss in self.means.items())
        return f"RangeLosses({means})"

    @property
    def means(self) -> dict[str, float]:
        """The loss of each range."""
        rows = zip(self.ranges, self.blocks, strict=True)
        return {name: sum(row) / len(row) for name, row in rows}

    @property
    def intervals(self) -> dict[str, Interval]:
        """The loss of each range with its interval."""
        intervals = {}
        for name, row in zip(self.ranges, self.blocks, strict=True):
            losses = torch.tensor(row, dtype=torch.float64)
            intervals[name] = Interval.of(float(losses.mean()), losses)
        return intervals

    def is_paired(self, other: RangeLosses) -> bool:
        """Whether block b has the same ranges and samples in both."""
        own, theirs = ([len(row) for row in losses.blocks] for losses in (self, other))
        return (self.ranges, self.draws, own) == (other.ranges, other.draws, theirs)

    def change(self, base: RangeLosses) -> dict[str, Interval]:
        """Return L / L_base - 1 for each range with its interval, from paired blocks."""
        if not self.is_paired(base):
            fix = "measure both models on one partition, with the same data and number of draws"
            raise UsageError("losses of different ranges or draws do not compare", fix=fix)
        changes = {}
        for name, own, other in zip(self.ranges, self.blocks, base.blocks, strict=True):
            a, b = torch.tensor([own, other], dtype=torch.float64)
            ratio = a.mean() / b.mean()
            changes[name] = Interval.of(float(ratio - 1), (a - ratio * b) / b.mean())
        return changes


@torch.inference_mode()
def range_losses(
    model: Diffusion,
    data: ImageData,
    partition: Partition,
    *,
    samples: int = 512,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress = silent,
) -> RangeLosses:
    """Measure the loss of each range on `samples` draws, at least one for each block.

    Raises:
        NumericalError: if a loss is not finite.
    """
    if partition.total != model.T:
        what = f"the partition covers {partition.total} timesteps, the model has {model.T}"
        raise UsageError(what, fix=f"use a partition of {model.T} timesteps")
    if samples < BLOCKS:
        what = f"{samples} samples do not fill {BLOCKS} blocks"
        raise UsageError(what, fix=f"give at least {BLOCKS}")
    rows = []
    for r, span in enumerate(partition):
        draws = torch.arange(samples).split(batch_size)
        with fitting_threads(model, batch_size):
            losses = torch.cat([_losses(model, data, span, r, j.tolist(), seed) for j in draws])
        if not bool(losses.isfinite().all()):
            what = f"the loss in {span} is not finite"
            raise NumericalError(what, fix="check the model's weights")
        rows.append(tuple(float(block.mean()) for block in losses.double().tensor_split(BLOCKS)))
        progress(r + 1, len(partition), str(span))
    return RangeLosses(tuple(map(str, partition)), tuple(rows), describe_draws(data, samples, seed))


def describe_draws(data: ImageData, samples: int, seed: int) -> str:
    """Return which images, timesteps and noise losses are measured on."""
    return f"{samples} draws of {data.fingerprint}, seed {seed}"


def _losses(
    model: Diffusion, data: ImageData, span: TimestepRange, r: int, draws: list[int], seed: int
) -> Tensor:
    """Return the losses [B] of some draws j of range r; draw j takes image order[j mod N]."""
    order = permutation(len(data), seed, "validation-images", r)
    chosen = [order[j % len(data)] for j in draws]
    x0, condition = model.encode_from(data, chosen)
    noise = normal(model.sample_shape, seed, "validation-noise", samples=draws, step=r)
    jitter = uniform(seed, "validation-t", samples=draws, step=r) / JITTER
    places = (torch.tensor(draws, dtype=torch.float64) * GOLDEN + jitter) % 1
    t = model.timesteps(span, places)
    return model.loss(x0, noise.to(model.device), t.to(model.device), condition).cpu()
