"""Held-out loss around a base: along the way to a merged model, and on the plane of two task vectors.

    path     theta_0 + s (theta_merged - theta_0)         s = 0 is the base, 1 the merged model, beyond it overshoots
    plane    theta_0 + w_i tau_i + w_j tau_j              (0, 0) the base, (1, 0) and (0, 1) the experts

The plane's axes are coefficients of a merge, not an orthonormal pair: what is read off it can be
typed into `--weights`. At each point the loss of every range is measured on the same images,
timesteps and noise (demerge.evaluation.metrics.range_losses), and given as the change against the
base, L_r / L_r(base) - 1, with the paired standard error: ranges differ in loss by orders of
magnitude, and raw values would show one of them only. Equal arguments give equal numbers.

Weights are written by `MergeSession.apply` into a copy of the denoiser; the model that was given is not touched.
Differs from Garipov et al. (arXiv 1802.10026), who draw planes in orthonormal coordinates, for the reason above.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from demerge.conflict import Array
from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.evaluation.metrics.range_losses import RangeLosses, range_losses
from demerge.merging.session import MergeSession, Model
from demerge.timesteps import Partition

Progress = Callable[[int, int, str], None]
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
STEPS = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
PATH, PLANE = ("s",), ("w_i", "w_j")


@dataclass(frozen=True, slots=True)
class Landscape:
    """Losses of each range at P points.

    Attributes:
        axes: the names of the coordinates, `s` of a path, `w_i` and `w_j` of a plane.
        points: coordinates [P][A].
        losses: at each point.
        base: at the base, which need not be a point.

    Raises:
        UsageError: unless there is a coordinate for each axis, a loss for each point, and a point.
    """

    axes: tuple[str, ...]
    points: tuple[tuple[float, ...], ...]
    losses: tuple[RangeLosses, ...]
    base: RangeLosses

    def __post_init__(self) -> None:
        if (
            not self.points
            or len(self.points) != len(self.losses)
            or {len(p) for p in self.points} != {len(self.axes)}
        ):
            raise UsageError(
                f"{len(self.points)} points on {len(self.axes)} axes and {len(self.losses)} losses do not fit",
                fix="give a coordinate for each axis and a loss for each point",
            )

    @property
    def ranges(self) -> tuple[str, ...]:
        """The ranges of timesteps, from least to most noise."""
        return self.base.ranges

    def table(self) -> pd.DataFrame:
        """Return one row for each point and range: its coordinates, then range, loss, change and se, both against the base."""
        rows = []
        for point, losses in zip(self.points, self.losses, strict=True):
            means = losses.means
            rows += [
                (*point, name, means[name], *change)
                for name, change in losses.change(self.base).items()
            ]
        return pd.DataFrame(rows, columns=[*self.axes, "range", "loss", "change", "se"])

    def grid(self, column: str, span: str) -> tuple[Array, Array, Array]:
        """Return a plane's coordinates w_i [A] and w_j [B], and a column of the table for one range, [B A].

        Raises:
            UsageError: where this is no plane, or the table has no such column or range.
        """
        if self.axes != PLANE or column not in ("loss", "change", "se") or span not in self.ranges:
            raise UsageError(
                f"no {column} of {span} on {' x '.join(self.axes)}",
                fix="ask for what the table of a plane holds",
            )
        table = self.table()
        found = table[table.range == span].pivot(index=PLANE[1], columns=PLANE[0], values=column)
        return (
            found.columns.to_numpy(np.float64),
            found.index.to_numpy(np.float64),
            found.to_numpy(np.float64),
        )


def loss_path(
    model: Diffusion,
    merged: Model | Diffusion,
    data: ImageData,
    partition: Partition,
    *,
    scales: Sequence[float] = SCALES,
    samples: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Landscape:
    """Measure the loss of each range on the way from the base `model` to `merged`, and beyond.

    Args:
        merged: a merged model, an expert or a control: a path, a state dict, a module or a `Diffusion`.
        data: images that neither the base nor the experts were trained on.
        scales: the values of s.
        samples: draws for each range and point.
        progress: called as progress(done, total, what) after each point.

    Raises:
        UsageError: where an argument is out of its range.
        InputError: where the two models do not fit each other.
        NumericalError: where a loss is not finite.
    """
    points = [(float(s),) for s in scales]
    return _measured(
        model, [merged], PATH, points, data, partition, samples, seed, batch_size, progress
    )


def loss_plane(
    model: Diffusion,
    first: Model | Diffusion,
    second: Model | Diffusion,
    data: ImageData,
    partition: Partition,
    *,
    steps: Sequence[float] = STEPS,
    samples: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Landscape:
    """Measure the loss of each range on the plane of the task vectors of two experts of the base `model`.

    Args:
        first: expert i, `second` expert j: paths, state dicts, modules or `Diffusion`s.
        steps: the values of w_i and of w_j; all pairs are measured.
        data: as `loss_path` takes it, and samples, seed, batch_size, progress too.

    Raises:
        UsageError, InputError, NumericalError: as `loss_path` does.
    """
    points = [(float(w_i), float(w_j)) for w_j in steps for w_i in steps]
    return _measured(
        model, [first, second], PLANE, points, data, partition, samples, seed, batch_size, progress
    )


def _measured(
    model: Diffusion,
    ends: Sequence[Model | Diffusion],
    axes: tuple[str, ...],
    points: Sequence[tuple[float, ...]],
    data: ImageData,
    partition: Partition,
    samples: int,
    seed: int,
    batch_size: int,
    progress: Progress | None,
) -> Landscape:
    """Write theta at each point into a copy of the denoiser and take its losses; the base is measured once."""
    _check(points, batch_size)
    experts = [end.denoiser if isinstance(end, Diffusion) else end for end in ends]
    session = MergeSession(model.denoiser, experts, model.device)
    live = model.with_denoiser(copy.deepcopy(model.denoiser).eval())
    origin = (0.0,) * len(axes)
    found: dict[tuple[float, ...], RangeLosses] = {}
    todo = list(dict.fromkeys([origin, *points]))
    for done, point in enumerate(todo, 1):
        session.apply(point, live.denoiser)
        found[point] = range_losses(
            live, data, partition, samples=samples, seed=seed, batch_size=batch_size
        )
        if progress is not None:
            progress(
                done,
                len(todo),
                ", ".join(f"{axis} = {value:g}" for axis, value in zip(axes, point, strict=True)),
            )
    return Landscape(axes, tuple(points), tuple(found[point] for point in points), found[origin])


def _check(points: Sequence[tuple[float, ...]], batch_size: int) -> None:
    if not points or len(set(points)) != len(points) or not np.isfinite(points).all():
        raise UsageError(
            "there is no point, one is given twice, or one is not finite",
            fix="give distinct finite numbers",
        )
    if batch_size < 1:
        raise UsageError(f"a batch size of {batch_size} holds no sample", fix="give at least 1")
