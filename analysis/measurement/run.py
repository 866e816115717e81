"""A measurement of gradients under way: what is known already, what the rest takes, and the map."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from demerge.analysis.measurement.backward import Backward
from demerge.analysis.measurement.budget import StopRule, by_cell
from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.collector import (
    GradientCollector,
    Identity,
    Reduction,
    SideBySide,
    products,
)
from demerge.analysis.measurement.fisher import RangeFisher
from demerge.analysis.measurement.gradients import Measurement, MeasurementCost
from demerge.analysis.measurement.options import MeasurementOptions
from demerge.analysis.measurement.samples import Draws
from demerge.analysis.measurement.sketch import CountSketch
from demerge.conflict import MIN_GROUPS, Array, ConflictMap, K, Origin
from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import accumulator, fitting_threads
from demerge.durations import format_seconds
from demerge.errors import ResourceError, UsageError
from demerge.parallel import ALONE, World
from demerge.progress import Progress, silent
from demerge.storage.atomic import check_disk_space

NOWHERE = MeasurementCheckpoint(None, {})


def measure(
    model: Diffusion,
    data: ImageData,
    options: MeasurementOptions | None = None,
    *,
    mode: str = "auto",
    progress: Progress = silent,
) -> ConflictMap:
    """Measure how the gradients of equal bins of timesteps conflict, on groups of samples.

    Args:
        mode: how gradients are computed: `flat`, `hooks`, or `auto` by size; the map is the same
            up to rounding.
        progress: called after each backward pass.

    Raises:
        UsageError: if an option is out of its range or the data does not fit the model.
        ResourceError: if what is stored does not fit the memory, or 5 groups do not fit the budget.
        NumericalError: if a gradient is not finite.
    """
    return begin(Measurement(model, data, options or MeasurementOptions(), mode)).map(progress)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A measurement that is ready to begin.

    Attributes:
        sketch, short: the sketch of a gradient, alone and with those of its layers.
        start: a map of fewer groups, to be extended. Its groups are measured again if it lacks what
            they need: a Fisher is in no map, nor are exact gradients.
        seconds: of the backward passes of a cell, if they were timed.
    """

    measurement: Measurement
    cells: GradientCollector
    sketch: CountSketch
    short: Reduction
    start: ConflictMap | None = None
    seconds: float | None = None

    @property
    def fisher(self) -> RangeFisher | None:
        """The Fisher that gets its share of each cell, if it is wanted."""
        return self.cells.fisher

    @property
    def extends_start(self) -> bool:
        """Whether the map to be extended holds the rows of its groups.

        They are sketches, or gradients no longer than a sketch.
        """
        has_rows = not self.measurement.is_exact or self.measurement.parameters <= K
        has_sketches = self.start is not None and self.start.sketches is not None
        return self.fisher is None and has_rows and has_sketches

    @property
    def known(self) -> int:
        """How many groups need not be measured, as far as this process sees."""
        stored = self.cells.checkpoint.count("group-")
        if self.fisher is not None:
            return min(stored, self.fisher.committed)
        return max(self.start.M if self.start is not None and self.extends_start else 0, stored)

    @property
    def cost(self) -> MeasurementCost:
        """What it will take; with a budget that of as many groups as fit."""
        o, most = self.measurement.options, self.measurement.most_groups
        if self.seconds is None:
            return replace(self._cost(most), at_most=o.is_open)
        if o.budget is not None:
            left = max(0.0, o.budget - self._estimate(0))
            fitting = self.cells.world.size * int(left / (o.bins * self.seconds))
            most = min(most, max(MIN_GROUPS, self.known + fitting))
        seconds = self._estimate(most - self.known)
        return replace(self._cost(most), seconds=seconds, at_most=o.target_se is not None)

    def _cost(self, groups: int) -> MeasurementCost:
        return self.measurement.cost(groups, 1 if self.fisher is None else self.fisher.parts)

    def _estimate(self, groups: int) -> float:
        """Return the expected seconds of that many groups, and of the pilots."""
        rounds = math.ceil(max(0, groups) / self.cells.world.size)
        cost, o = self.measurement.cost(MIN_GROUPS), self.measurement.options
        pilots = cost.passes - MIN_GROUPS * o.bins + cost.trials * 2 / o.batch_size
        return (self.seconds or 0.0) * (rounds * o.bins + pilots)

    def check_budget(self) -> None:
        """Check that the budget holds 5 groups.

        Raises:
            ResourceError: if not, saying how long they take, and what would do.
        """
        o = self.measurement.options
        needed = self._estimate(MIN_GROUPS - self.known)
        if o.budget is None or needed <= o.budget:
            return
        share = o.budget / needed
        bins, batch_size = int(o.bins * share), int(o.batch_size * share) // 2 * 2
        fixes = [f"give --budget {math.ceil(needed * 1.1)}s"]
        fixes += [f"--bins {bins}"] if bins >= 2 else []
        fixes += [f"--batch-size {batch_size}"] if batch_size >= 2 else []
        raise ResourceError(
            f"{MIN_GROUPS} groups of {o.bins} bins take about {format_seconds(needed)},"
            f" and the budget is {format_seconds(o.budget)}",
            fix=", or ".join(fixes),
        )

    def map(
        self, progress: Progress = silent, early: Callable[[ConflictMap], None] | None = None
    ) -> ConflictMap:
        """Measure, and return the map.

        Args:
            progress: called after each backward pass.
            early: called once, with the map of the first groups: 5, or those known before.

        Raises:
            NumericalError: if a gradient is not finite, naming bin, group and sample.
        """
        measurement, cells, cost = self.measurement, self.cells, self.cost
        if cells.checkpoint.folder is not None:
            check_disk_space(cells.checkpoint.folder, cost.bytes)
        cells.progress, cells.total = progress, cost.passes + cost.trials
        with fitting_threads(measurement.model, measurement.options.batch_size):
            if self.fisher is not None:
                self.fisher.begin(cells.backward.D, measurement.model.device)
            origin = measurement.origin(self._choose_noise())
            return self._map(self._rows(origin, early), origin)

    def _rows(self, origin: Origin, early: Callable[[ConflictMap], None] | None) -> Tensor:
        """Return the gradients or sketches of all groups, [M N *]."""
        measurement, cells = self.measurement, self.cells
        o = measurement.options
        width = measurement.parameters if measurement.is_exact else self.sketch.width

        def map_of(gram: Array) -> ConflictMap:
            return ConflictMap(measurement.bins, gram, measurement.log_snr, origin)

        def first(rows: Tensor) -> None:
            if early is not None:
                early(map_of(by_cell(products(rows[..., :width].flatten(0, 1)), len(rows))))

        stop = StopRule(o.budget, o.target_se, cells.took, map_of, width, time.monotonic())
        return cells.rows(
            measurement.most_groups,
            adam=o.metric == "adam",
            start=self._known_rows(),
            is_enough=stop if o.is_open else None,
            first=first,
        )

    def _choose_noise(self) -> bool | tuple[bool, ...]:
        """Return which bins have antithetic noise, and let the draws have it."""
        if self.measurement.options.antithetic != "auto":
            return self.measurement.options.antithetic == "on"
        before = None if self.start is None else self.start.origin.antithetic
        chosen = before if isinstance(before, tuple) else self.cells.noise()
        self.cells.draws = replace(self.cells.draws, antithetic=chosen)
        return chosen

    def _known_rows(self) -> Tensor | None:
        """Return the rows of the map to be extended, [M N *].

        A sketch that keeps all coordinates is the gradient but for its signs.
        """
        if self.start is None or self.start.sketches is None or not self.extends_start:
            return None
        parts = [self.start.sketches]
        if self.measurement.is_exact:
            parts = [self.start.sketches * self.sketch.signs.cpu().numpy()]
        elif self.measurement.options.layers and self.start.layers is not None:
            parts.append(self.start.layers)
        return torch.from_numpy(np.concatenate(parts, axis=2)).transpose(0, 1)

    def _map(self, rows: Tensor, origin: Origin) -> ConflictMap:
        measurement, width = self.measurement, self.sketch.width
        short = _reduce(rows, self.short) if measurement.is_exact else rows
        whole = rows if measurement.is_exact else rows[..., :width]
        sketches = short.transpose(0, 1).cpu().numpy()
        return ConflictMap(
            measurement.bins,
            by_cell(products(whole.flatten(0, 1)), len(rows)),
            measurement.log_snr,
            origin,
            measurement.layout,
            sketches[..., :width],
            sketches[..., width:] if measurement.options.layers else None,
        )


def begin(
    measurement: Measurement,
    checkpoint: MeasurementCheckpoint = NOWHERE,
    *,
    world: World = ALONE,
    start: ConflictMap | None = None,
    fisher: RangeFisher | None = None,
    timed: bool = False,
) -> Run:
    """Prepare to measure what neither `checkpoint` nor the map `start` of fewer groups holds.

    Args:
        world: the processes among which the groups are shared.
        fisher: gets its share of each cell; what it lacks is measured again, whatever `start` has.
        timed: whether a backward pass is timed for the cost; for a budget it always is.

    Raises:
        UsageError: if `start` has sketches of layers, which more groups would lack.
        ResourceError: if 5 groups do not fit the budget.
    """
    o, model = measurement.options, measurement.model
    if start is not None and start.layers is not None and not o.layers:
        raise UsageError(
            f"the map of {start.M} groups has sketches of layers, which more groups would lack",
            fix="add --layers",
        )
    denoiser = copy.deepcopy(model.denoiser).float().eval()
    draws = Draws(
        model.with_denoiser(denoiser),
        measurement.data,
        measurement.bins,
        o.batch_size,
        o.seed,
        shared=o.draws == "shared",
        antithetic=o.antithetic == "on",
    )
    backward = Backward(denoiser, o.params, measurement.mode)
    sketch = CountSketch.of(backward.D, o.seed, device=model.device)
    parts: list[Reduction] = [sketch]
    if o.layers:
        parts.append(sketch.layers(measurement.layout))
    short = SideBySide(parts)
    cells = GradientCollector(
        draws,
        backward,
        Identity(backward.D) if measurement.is_exact else short,
        checkpoint,
        world=world,
        precision=o.mixed_precision,
        fisher=fisher,
    )
    run = Run(measurement, cells, sketch, short, start)
    if timed or o.budget is not None:
        with fitting_threads(model, o.batch_size):
            run = replace(run, seconds=cells.seconds())
    run.check_budget()
    return run


def _reduce(rows: Tensor, reduction: Reduction) -> Tensor:
    """Return what is stored [M N width] of gradients [M N D]."""
    flat = rows.flatten(0, 1)
    totals = accumulator((len(flat), reduction.width), rows.device)
    for total, row in zip(totals, flat, strict=True):
        reduction.add(total, 0, row)
    short: Tensor = totals.float().unflatten(0, rows.shape[:2])
    return short
