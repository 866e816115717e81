"""Held-out loss around a base: along the way to a merged model, and on a plane of two experts.

    path     theta_0 + s (theta_merged - theta_0)         s = 0 is the base, 1 the merged model,
                                                          beyond it overshoots
    plane    theta_0 + w_i tau_i + w_j tau_j              (0, 0) the base, (1, 0) and (0, 1) the
                                                          experts

The plane's axes are coefficients of a merge, not an orthonormal pair: what is read off it can be
typed into `--weights`. At each point the loss of every range is measured on the same images,
timesteps and noise (demerge.evaluation.metrics.range_losses). It is given as the change against the
base, L_r / L_r(base) - 1, with the paired standard error, since the losses of ranges differ by
orders of magnitude. Equal arguments give equal numbers.

Weights are written by `MergeSession.apply` into a copy of the denoiser.
Differs from Garipov et al. (arXiv 1802.10026), who draw planes in orthonormal coordinates, for the
reason above.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from demerge.conflict import Array
from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.evaluation.metrics.range_losses import RangeLosses, range_losses
from demerge.merging.session import MergeSession, Model
from demerge.progress import Progress, silent
from demerge.timesteps import Partition

PATH, PLANE = ("s",), ("w_i", "w_j")
Point = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Landscape:
    """Losses of each range at P points."""

    axes: tuple[str, ...]  # the names of the coordinates, `s` of a path, `w_i` and `w_j` of a plane
    points: tuple[Point, ...]  # coordinates [P][A]
    losses: tuple[RangeLosses, ...]  # at each point
    base: RangeLosses  # at the base, which need not be a point

    @property
    def ranges(self) -> tuple[str, ...]:
        """The ranges of timesteps, from least to most noise."""
        return self.base.ranges

    def table(self) -> pd.DataFrame:
        """Return a row per point and range: coordinates, range, loss, change, se."""
        rows = []
        for point, losses in zip(self.points, self.losses, strict=True):
            means = losses.means
            for name, change in losses.change(self.base).items():
                rows.append((*point, name, means[name], change.value, change.se))
        return pd.DataFrame(rows, columns=[*self.axes, "range", "loss", "change", "se"])

    def grid(self, column: str, span: str) -> tuple[Array, Array, Array]:
        """Return a plane's coordinates w_i [A] and w_j [B], and a column for one range, [B A]."""
        table = self.table()
        grid = table[table.range == span].pivot(index=PLANE[1], columns=PLANE[0], values=column)
        x, y = grid.columns.to_numpy(np.float64), grid.index.to_numpy(np.float64)
        return x, y, grid.to_numpy(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """How losses around a base `model` are measured."""

    model: Diffusion
    data: ImageData  # images that neither the base nor the experts were trained on
    ranges: Partition
    samples: int = 256  # draws for each range and point
    seed: int = 0
    batch_size: int = 64

    def measure(self, model: Diffusion) -> RangeLosses:
        """Return the losses of a model."""
        size: Any = {"samples": self.samples, "seed": self.seed, "batch_size": self.batch_size}
        return range_losses(model, self.data, self.ranges, **size)


def measure_landscape(
    probe: Probe,
    ends: Sequence[Model | Diffusion],
    points: Sequence[Point],
    progress: Progress = silent,
) -> Landscape:
    """Measure the loss of each range on the way to one model, or on the plane of two experts.

    The base is measured once.

    Args:
        ends: one merged model or two experts: paths, state dicts, modules or `Diffusion`s.
        points: the coordinates (s,) or (w_i, w_j).
        progress: called after each point.
    """
    model, axes = probe.model, PATH if len(ends) == 1 else PLANE
    experts = [end.denoiser if isinstance(end, Diffusion) else end for end in ends]
    session = MergeSession(model.denoiser, experts, model.device)
    live = model.with_denoiser(copy.deepcopy(model.denoiser).eval())
    origin = (0.0,) * len(axes)
    losses: dict[Point, RangeLosses] = {}
    todo = list(dict.fromkeys([origin, *points]))
    for done, point in enumerate(todo, 1):
        session.apply(point, live.denoiser)
        losses[point] = probe.measure(live)
        text = (f"{axis} = {value:g}" for axis, value in zip(axes, point, strict=True))
        progress(done, len(todo), ", ".join(text))
    return Landscape(axes, tuple(points), tuple(losses[at] for at in points), losses[origin])
