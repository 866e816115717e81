"""The cells of a conflict map, group after group: one backward pass each, of which a row is kept.

A row is the gradient of the cell's loss, or a count sketch of it, in the adam metric scaled by v^(-1/4) beforehand. Rows of
a finished group are committed, so that a killed measurement loses one group at most (of each process). Whatever the
precision of the model's arithmetic, rows are summed in float64 and kept in float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import Protocol

import torch
from torch import Tensor

from demerge.analysis.measurement.backward import Backward, Consume
from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.draws import Draw, Draws
from demerge.analysis.measurement.fisher import RangeFisher
from demerge.analysis.measurement.parallel import ALONE, World
from demerge.conflict import MIN_GROUPS, Array
from demerge.diffusion.numerics import accumulator
from demerge.errors import NumericalError
from demerge.timesteps import TimestepRange

Progress = Callable[[int, int, str], None]

Enough = Callable[[Tensor], bool]

COLUMNS = 1 << 15
TRIALS = 4  # of each kind of noise
TIMED, TIMED_SECONDS = 6, 1.0


class Reduction(Protocol):
    """What is kept of a gradient: a linear map to `width` numbers."""

    @property
    def width(self) -> int:
        """How many numbers."""

    def add(self, total: Tensor, start: int, x: Tensor) -> None:
        """Add what is kept of the coordinates [start, start + n), x [n], to `total` [width] in place."""


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Keeps the gradient itself, of `width` coordinates."""

    width: int

    def add(self, total: Tensor, start: int, x: Tensor) -> None:
        """Add x [n] to the coordinates [start, start + n) of `total` [width]."""
        total[start : start + len(x)] += x


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Keeps several things of a gradient, one after the other."""

    parts: Sequence[Reduction]

    @property
    def width(self) -> int:
        """How many numbers all of them keep."""
        return sum(part.width for part in self.parts)

    def add(self, total: Tensor, start: int, x: Tensor) -> None:
        """Add x [n] to each part."""
        for part, own in zip(
            self.parts, total.split([part.width for part in self.parts]), strict=True
        ):
            part.add(own, start, x)


@dataclass(slots=True)
class GradientCollector:
    """The cells of a measurement, run through once.

    Attributes:
        keep: what is kept of a gradient.
        total: how many backward passes there will be, for `progress`, called as progress(done, total, what) after each.
        world: the processes that share the groups; every n-th one is this one's.
        precision: of the model's forward pass, `no` or `bf16` under autocast.
        scale: v^(-1/4) [D] of the adam metric.
        fisher: takes its share of each cell, where it is asked for.
        took: seconds of each group that was measured, not loaded.
    """

    draws: Draws
    backward: Backward
    keep: Reduction
    partial: MeasurementCheckpoint
    total: int
    progress: Progress | None = None
    world: World = ALONE
    precision: str = "no"
    scale: Tensor | None = None
    fisher: RangeFisher | None = None
    done: int = 0
    took: list[float] = field(default_factory=list)

    def rows(
        self,
        most: int,
        *,
        adam: bool = False,
        start: Tensor | None = None,
        enough: Enough | None = None,
        first: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Return the gradients or sketches of the cells of M groups, [M N *]; each finished group is committed.

        Args:
            most: M, or the most there may be, where `enough` ends it before.
            start: rows of the first groups [m N *], from an earlier map.
            enough: whether the rows [m N *] are enough, asked from 5 groups on, and from those that the Fisher holds.
            first: called once by the first process, with the first rows that `enough` could be asked of.

        Raises:
            NumericalError: where a gradient is not finite, naming bin, group and sample.
        """
        known = 0 if start is None else len(start)
        rows = torch.zeros(most, len(self.draws.bins), self.keep.width, device=self.device)
        if start is not None:
            rows[:known] = start.to(rows.device)
            self.done += known * len(self.draws.bins)
        if adam:
            self.scale = adam_scale(self.pilot())
        least = max(MIN_GROUPS, 0 if self.fisher is None else self.fisher.done)
        while known < most:
            stop = min(known + self.world.size, most)
            if known + self.world.rank < stop:
                self._group(rows[known + self.world.rank], known + self.world.rank)
            for m in range(known, stop):
                self.world.share(rows[m], m - known)
                if self.fisher is not None:
                    self._commit(self.fisher, m, m - known)
            known = stop
            if first is not None and self.world.main and known >= least:
                first(rows[:known])
                first = None
            if enough is not None and known >= least:
                done = self.world.main and enough(rows[:known])
                if self.world.agree(done, self.device):
                    break
        return rows[:known]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.draws.model.device

    def seconds(self) -> float:
        """Return the seconds of a cell's backward passes, as found on a few cells; a first one that takes long is enough."""
        spans = self.draws.bins.ranges
        passes: list[float] = []
        for i, draw in enumerate(islice(cycle(self.draws.pilot()), TIMED)):
            began = time.perf_counter()
            span, total = spans[i % len(spans)], accumulator((self.keep.width,), self.device)
            if self.fisher is None:
                total = self._kept(draw, span)
            else:
                self.fisher.passes(
                    draw,
                    span,
                    self._loss,
                    self.backward,
                    self._weighed(partial(self.keep.add, total)),
                )
            bool(total.isfinite().all())  # waits for the device
            passes.append(time.perf_counter() - began)
            if sum(passes) > TIMED_SECONDS:
                break
        return self.world.agree(statistics.median(passes[1:] or passes), self.device)

    def pilot(self) -> Tensor:
        """Return v [D], the mean square of each coordinate over a cell of each bin."""
        found = self._once("pilot", (self.backward.D,), self._mean_squares)
        return found.to(self.device)

    def noise(self) -> tuple[bool, ...]:
        """Return for each bin whether antithetic noise gives the shorter gradients, which have the same mean.

        E |s|^2 = |mu|^2 + tr Sigma / B: of two kinds of B samples, the one with the shorter gradients has less noise. TRIALS
        cells of two samples each are compared, and each bin goes by the sum over itself and its neighbours.
        """
        squares = self._once("antithetic", (2, len(self.draws.bins)), self._trial_squares)
        near = squares.clone()
        near[:, 1:] += squares[:, :-1]
        near[:, :-1] += squares[:, 1:]
        return tuple((near[1] < near[0]).tolist())

    def _once(self, name: str, shape: Sequence[int], make: Callable[[], Tensor]) -> Tensor:
        """Return what the first process loads, or makes and commits, as all need it."""
        values = torch.zeros(tuple(shape), device=self.device)
        if self.world.main:
            found = self.partial.load(name, shape)
            if found is None:
                found = make()
                self.partial.save(name, found)
            else:
                self.done += (2 * TRIALS if name == "antithetic" else 1) * len(self.draws.bins)
            values.copy_(found)
        return self.world.share(values)

    def _mean_squares(self) -> Tensor:
        v = torch.zeros(self.backward.D, device=self.device)

        def add(start: int, values: Tensor) -> None:
            v[start : start + len(values)] += values.float().square() / len(self.draws.bins)

        for span, draw in zip(self.draws.bins, self.draws.pilot(), strict=True):
            self.backward(self._loss(draw, span), add)
            self._check_finite(v, span, "pilot", draw)
            self._tick(f"pilot {span}")
        return v

    def _trial_squares(self) -> Tensor:
        """Return the sums of squares of plain and antithetic gradients, [2 N]."""
        squares = torch.zeros(2, len(self.draws.bins))
        for i, span in enumerate(self.draws.bins):
            for j in range(TRIALS):
                for kind, draw in enumerate(self.draws.trial(i, j)):
                    kept = self._kept(draw, span)
                    self._check_finite(kept, span, "pilot of the noise", draw)
                    squares[kind, i] += float(kept.square().sum())
                    self._tick(f"noise {span}")
        return squares

    def _group(self, rows: Tensor, m: int) -> None:
        """Load group m into rows [N *], or measure and commit it."""
        found = self.partial.load(name := f"group-{m:04d}", rows.shape)
        if found is not None and (self.fisher is None or self.fisher.holds(m)):
            rows.copy_(found)
            self.done += len(rows) * self.world.size
            return
        began = time.perf_counter()
        self._fill(rows, m)
        self.partial.save(name, rows)
        self.took.append(time.perf_counter() - began)

    def _commit(self, fisher: RangeFisher, m: int, owner: int) -> None:
        """Let the Fisher take group m; the time counts to this process's own group."""
        began = time.perf_counter()
        fisher.commit(m, owner)
        if self.took and owner == self.world.rank:
            self.took[-1] += time.perf_counter() - began

    def _fill(self, rows: Tensor, m: int) -> None:
        """Put the gradient or sketch of each bin on group m into rows [N *]."""
        for i, (row, span, draw) in enumerate(
            zip(rows, self.draws.bins, self.draws.group(m), strict=True)
        ):
            if self.fisher is None:
                row.copy_(self._kept(draw, span))
            else:
                total = accumulator((self.keep.width,), row.device)
                consume = self._weighed(partial(self.keep.add, total))
                self.fisher.cell(m, i, draw, self._loss, self.backward, consume)
                row.copy_(total)
            self._check_finite(row, span, f"group {m}", draw)
            self._tick(f"bin {span}", self.world.size)

    def _kept(self, draw: Draw, span: TimestepRange) -> Tensor:
        """Return what is kept [*] of the gradient of one cell, summed in float64."""
        total = accumulator((self.keep.width,), self.device)
        self.backward(self._loss(draw, span), self._weighed(partial(self.keep.add, total)))
        return total

    def _loss(self, draw: Draw, span: TimestepRange) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return draw.loss(self.draws.model, span)

    def _weighed(self, consume: Consume) -> Consume:
        """Scale the pieces as the metric says before they are consumed."""
        scale = self.scale
        if scale is None:
            return consume
        return lambda start, values: consume(
            start, values.float() * scale[start : start + len(values)]
        )

    def _tick(self, what: str, passes: int = 1) -> None:
        self.done += passes
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total, what)

    def _check_finite(self, values: Tensor, span: TimestepRange, where: str, draw: Draw) -> None:
        """Refuse a cell by the first of its samples whose gradient is not finite; a sketch of it is not finite either."""
        if bool(values.isfinite().all()):
            return
        found = next(
            (b for b in range(len(draw.images)) if not self._is_finite(draw.only(b), span)), None
        )
        sample = "though that of each sample is"
        if found is not None:
            image, t = draw.images[found], int(draw.timesteps(span)[found])
            sample = f"at sample {found} (image {image} of {self.draws.data.name}, t = {t})"
        raise NumericalError(
            f"the gradient in bin {span}, {where}, is not finite, {sample}",
            fix="check the model's weights and this image",
        )

    def _is_finite(self, draw: Draw, span: TimestepRange) -> bool:
        found: list[bool] = []
        self.backward(
            self._loss(draw, span), lambda _, values: found.append(bool(values.isfinite().all()))
        )
        return all(found)


def products(rows: Tensor, others: Tensor | None = None) -> Array:
    """Return the inner products [R S] of the rows of [R D] with themselves or [S D], blocks of float32 summed in float64."""
    against = rows if others is None else others
    gram = torch.zeros(len(rows), len(against), dtype=torch.float64)
    for block, other in zip(rows.split(COLUMNS, dim=1), against.split(COLUMNS, dim=1), strict=True):
        gram += (block @ other.T).cpu().double()
    found: Array = ((gram + gram.T) / 2 if others is None else gram).numpy()
    return found


def adam_scale(v: Tensor) -> Tensor:
    """Return v^(-1/4) [D] of mean squares v [D]; 1 where v = 0 and there is nothing to scale by."""
    return torch.where(v > 0, v, 1).sqrt().rsqrt()
