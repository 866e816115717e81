"""The cells of a conflict map, group after group: one backward pass each, of which a row is stored.

A row is the gradient of the cell's loss, or a count sketch of it; in the adam metric the gradient
is scaled by v^(-1/4) first. Rows of a finished group are committed, so that a killed measurement
loses one group at most (of each process). Whatever the precision of the model's arithmetic, rows
are summed in float64 and stored in float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor

from demerge.analysis.measurement.backward import Backward, Consume
from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.fisher import RangeFisher
from demerge.analysis.measurement.samples import TRIALS, Draw, Draws
from demerge.analysis.measurement.sketch import Sketches
from demerge.conflict import MIN_GROUPS, Array
from demerge.diffusion.numerics import accumulator
from demerge.errors import NumericalError
from demerge.parallel import ALONE, World
from demerge.progress import Progress, silent
from demerge.timesteps import TimestepRange

COLUMNS = 1 << 15
TIMED, TIMED_SECONDS = 6, 1.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Stores the gradient itself, of `width` coordinates."""

    width: int

    def add(self, total: Tensor, start: int, x: Tensor) -> None:
        """Add x [n] to the coordinates [start, start + n) of `total` [width]."""
        total[start : start + len(x)] += x


@dataclass(slots=True)
class GradientCollector:
    """The cells of a measurement, run through once."""

    draws: Draws
    backward: Backward
    reduction: Identity | Sketches  # what is stored of a gradient, `width` numbers
    checkpoint: MeasurementCheckpoint  # where finished groups are stored
    world: World = ALONE  # the processes that share the groups; every n-th one is this one's
    precision: str = "no"  # of the model's forward pass, `no` or `bf16` under autocast
    fisher: RangeFisher | None = None  # gets its share of each cell, if it is wanted
    progress: Progress = silent  # called after each backward pass
    total: int = 0
    scale: Tensor | None = None  # v^(-1/4) [D] of the adam metric
    done: int = 0
    took: list[float] = field(default_factory=list)  # seconds of each measured group

    def rows(
        self,
        most: int,
        is_adam: bool = False,
        start: Tensor | None = None,
        is_enough: Callable[[Tensor], bool] | None = None,
        first: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Return the gradients or sketches of the cells of M groups, [M N *].

        Args:
            most: M, or the most there may be, if `is_enough` ends it before.
            start: rows of the first groups [m N *], from an earlier map.
            is_enough: whether rows [m N *] are enough; asked from 5 groups on, and from those that
                the Fisher holds.
            first: called once by the first process, with the first rows that `is_enough` could get.
        """
        known = 0 if start is None else len(start)
        rows = torch.zeros(most, len(self.draws.bins), self.reduction.width, device=self.device)
        if start is not None:
            rows[:known] = start.to(rows.device)
            self.done += known * len(self.draws.bins)
        if is_adam:
            v = self._load_or_make("pilot", (self.backward.D,), self._mean_squares)
            self.scale = adam_scale(v)
        least = max(MIN_GROUPS, 0 if self.fisher is None else self.fisher.done)
        while known < most:
            stop = min(known + self.world.size, most)
            if known + self.world.rank < stop:
                self._measure_group(rows[known + self.world.rank], known + self.world.rank)
            for owner, m in enumerate(range(known, stop)):
                self.world.broadcast(rows[m], owner)
                began = time.perf_counter()
                if self.fisher is not None:
                    self.fisher.commit(m, owner)
                if self.took and owner == self.world.rank:  # it counts to the process's own group
                    self.took[-1] += time.perf_counter() - began
            known = stop
            if known < least:
                continue
            if first is not None and self.world.is_main:
                first(rows[:known])
                first = None
            if is_enough is not None:
                enough = self.world.is_main and is_enough(rows[:known])
                if self.world.broadcast_number(enough, self.device):
                    break
        return rows[:known]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.draws.model.device

    def seconds(self) -> float:
        """Return the seconds of a cell's backward passes, timed on a few cells."""
        spans = self.draws.bins.ranges
        passes: list[float] = []
        for i, draw in enumerate(islice(cycle(self.draws.pilot()), TIMED)):
            began = time.perf_counter()
            span = spans[i % len(spans)]
            if self.fisher is None:
                total = self._reduced(draw, span)
            else:
                total, consume = self._accumulate()
                self.fisher.passes(draw, span, self._loss, self.backward, consume)
            bool(total.isfinite().all())  # waits for the device
            passes.append(time.perf_counter() - began)
            if sum(passes) > TIMED_SECONDS:
                break
        return self.world.broadcast_number(statistics.median(passes[1:] or passes), self.device)

    def noise(self) -> tuple[bool, ...]:
        """Return for each bin whether antithetic noise gives the shorter gradients.

        Both kinds have the same mean, and E |s|^2 = |mu|^2 + tr Sigma / B: of two kinds of B
        samples, the one with the shorter gradients has less noise. TRIALS cells of two samples each
        are compared, and each bin goes by the sum over itself and its neighbours.
        """
        shape = (2, len(self.draws.bins))
        squares = self._load_or_make("antithetic", shape, self._trial_squares)
        near = squares.clone()
        near[:, 1:] += squares[:, :-1]
        near[:, :-1] += squares[:, 1:]
        return tuple((near[1] < near[0]).tolist())

    def _load_or_make(self, name: str, shape: Sequence[int], make: Callable[[], Tensor]) -> Tensor:
        """Return what the first process loads, or makes and commits, as all need it."""
        values = torch.zeros(tuple(shape), device=self.device)
        if self.world.is_main:
            loaded = self.checkpoint.load(name, shape)
            if loaded is None:
                loaded = make()
                self.checkpoint.save(name, loaded)
            else:
                self.done += (2 * TRIALS if name == "antithetic" else 1) * len(self.draws.bins)
            values.copy_(loaded)
        return self.world.broadcast(values)

    def _mean_squares(self) -> Tensor:
        """Return v [D], the mean square of each coordinate over a cell of each bin."""
        v = torch.zeros(self.backward.D, device=self.device)

        def add(start: int, values: Tensor) -> None:
            v[start : start + len(values)] += values.float().square() / len(self.draws.bins)

        for span, draw in zip(self.draws.bins, self.draws.pilot(), strict=True):
            self.backward(self._loss(draw, span), add)
            self._check_finite(v, span, "pilot", draw)
            self._count(f"pilot {span}")
        return v

    def _trial_squares(self) -> Tensor:
        """Return the sums of squares of plain and antithetic gradients, [2 N]."""
        squares = torch.zeros(2, len(self.draws.bins))
        for i, span in enumerate(self.draws.bins):
            for j in range(TRIALS):
                for kind, draw in enumerate(self.draws.trial(i, j)):
                    row = self._reduced(draw, span)
                    self._check_finite(row, span, "pilot of the noise", draw)
                    squares[kind, i] += float(row.square().sum())
                    self._count(f"noise {span}")
        return squares

    def _measure_group(self, rows: Tensor, m: int) -> None:
        """Load group m into rows [N *], or measure and commit it."""
        name = f"group-{m:04d}"
        loaded = self.checkpoint.load(name, rows.shape)
        if loaded is not None and (self.fisher is None or m < self.fisher.done):
            rows.copy_(loaded)
            self.done += len(rows) * self.world.size
            return
        began = time.perf_counter()
        cells = zip(rows, self.draws.bins, self.draws.group(m), strict=True)
        for i, (row, span, draw) in enumerate(cells):
            if self.fisher is None:
                row.copy_(self._reduced(draw, span))
            else:
                total, consume = self._accumulate()
                self.fisher.add_cell(m, i, draw, self._loss, self.backward, consume)
                row.copy_(total)
            self._check_finite(row, span, f"group {m}", draw)
            self._count(f"bin {span}", self.world.size)
        self.checkpoint.save(name, rows)
        self.took.append(time.perf_counter() - began)

    def _reduced(self, draw: Draw, span: TimestepRange) -> Tensor:
        """Return what is stored [*] of the gradient of one cell, summed in float64."""
        total, consume = self._accumulate()
        self.backward(self._loss(draw, span), consume)
        return total

    def _accumulate(self) -> tuple[Tensor, Consume]:
        """Return zeros [*], and what adds pieces of a gradient to them, scaled by the metric."""
        total = accumulator((self.reduction.width,), self.device)
        add, scale = partial(self.reduction.add, total), self.scale
        if scale is None:
            return total, add
        return total, lambda start, x: add(start, x.float() * scale[start : start + len(x)])

    def _loss(self, draw: Draw, span: TimestepRange) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return draw.loss(self.draws.model, span)

    def _count(self, text: str, passes: int = 1) -> None:
        self.done += passes
        self.progress(min(self.done, self.total), self.total, text)

    def _check_finite(self, values: Tensor, span: TimestepRange, where: str, draw: Draw) -> None:
        """Check a cell; the error names its first sample whose gradient is not finite."""
        if bool(values.isfinite().all()):
            return
        finite: list[bool] = []

        def check(start: int, values: Tensor) -> None:
            finite.append(bool(values.isfinite().all()))

        sample = "though that of each sample is"
        for b, image in enumerate(draw.images):
            self.backward(self._loss(draw.select(slice(b, b + 1)), span), check)
            if not all(finite):
                t = int(self.draws.model.timesteps(span, draw.position)[b])
                sample = f"at sample {b} (image {image} of {self.draws.data.name}, t = {t})"
                break
        what = f"the gradient in bin {span}, {where}, is not finite, {sample}"
        raise NumericalError(what, fix="check the model's weights and this image")


def products(rows: Tensor, others: Tensor | None = None) -> Array:
    """Return inner products [R S] of rows [R D] with themselves or [S D], summed in float64."""
    against = rows if others is None else others
    gram = torch.zeros(len(rows), len(against), dtype=torch.float64)
    for block, other in zip(rows.split(COLUMNS, dim=1), against.split(COLUMNS, dim=1), strict=True):
        gram += (block @ other.T).cpu().double()
    return ((gram + gram.T) / 2 if others is None else gram).numpy()


def adam_scale(v: Tensor) -> Tensor:
    """Return v^(-1/4) [D] of mean squares v [D]; 1 if v = 0 and there is nothing to scale by."""
    return torch.where(v > 0, v, 1).sqrt().rsqrt()
