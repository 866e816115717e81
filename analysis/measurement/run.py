"""A measurement of gradients under way: what is known already, what the rest takes, and the map."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demerge.analysis.measurement.backward import Backward
from demerge.analysis.measurement.budget import StopRule, by_cell
from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.collector import GradientCollector, Identity, products
from demerge.analysis.measurement.fisher import RangeFisher
from demerge.analysis.measurement.gradients import Measurement, MeasurementCost
from demerge.analysis.measurement.options import MeasurementOptions
from demerge.analysis.measurement.samples import Draws
from demerge.analysis.measurement.sketch import CountSketch, Sketches
from demerge.conflict import MIN_GROUPS, Array, ConflictMap, K, Origin
from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import accumulator, fitting_threads
from demerge.durations import format_seconds
from demerge.errors import ResourceError, UsageError
from demerge.parallel import ALONE, World
from demerge.progress import Progress, silent
from demerge.storage.atomic import check_disk_space
from demerge.timesteps import Partition

NOWHERE = MeasurementCheckpoint(None, {})


def measure(
    model: Diffusion,
    data: ImageData,
    options: MeasurementOptions | None = None,
    *,
    mode: str = "auto",
    ranges: Partition | None = None,
    progress: Progress = silent,
) -> ConflictMap:
    """Measure how the gradients of equal bins of timesteps conflict, on groups of samples.

    Args:
        mode: how gradients are computed: `flat`, `hooks`, or `auto` by size; the map is the same
            up to rounding.
        ranges: bins are cut at their boundaries too, so that they can be judged exactly.
        progress: called after each backward pass.

    Raises:
        UsageError: if an option is out of its range or the data does not fit the model.
        ResourceError: if what is stored does not fit the memory, or 5 groups do not fit the budget.
        NumericalError: if a gradient is not finite.
    """
    measurement = Measurement(model, data, options or MeasurementOptions(), mode, ranges)
    return begin(measurement).map(progress)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A measurement that is ready to begin."""

    measurement: Measurement
    cells: GradientCollector
    sketch: CountSketch  # of a gradient
    short: Sketches  # the sketch, and those of its layers if wanted
    start: ConflictMap | None = None  # a map of fewer groups, to be extended
    seconds: float | None = None  # of the passes of a cell, if they were timed

    @property
    def known(self) -> int:
        """How many groups need not be measured, as far as this process sees."""
        stored, sketches = self.cells.checkpoint.count("group-"), self._start_sketches
        if self.cells.fisher is not None:
            return min(stored, self.cells.fisher.committed)
        return max(0 if sketches is None else sketches.shape[1], stored)

    @property
    def _start_sketches(self) -> NDArray[np.float32] | None:
        """The sketches of the map to be extended, None if rows cannot be made from them.

        A Fisher is in no map. A sketch of all coordinates is the gradient but for its signs.
        """
        has_rows = not self.measurement.is_exact or self.measurement.parameters <= K
        if self.start is None or not has_rows or self.cells.fisher is not None:
            return None
        return self.start.sketches

    @property
    def cost(self) -> MeasurementCost:
        """What it will take; with a budget that of as many groups as fit."""
        o, most = self.measurement.options, self.measurement.most_groups
        parts = 1 if self.cells.fisher is None else self.cells.fisher.parts
        if self.seconds is None:
            return replace(self.measurement.cost(most, parts), at_most=o.is_open)
        if o.budget is not None:
            left = max(0.0, o.budget - self._estimate(0))
            fitting = self.cells.world.size * int(left / (o.bins * self.seconds))
            most = min(most, max(MIN_GROUPS, self.known + fitting))
        seconds = self._estimate(most - self.known)
        cost = self.measurement.cost(most, parts)
        return replace(cost, seconds=seconds, at_most=o.target_se is not None)

    def _estimate(self, groups: int) -> float:
        """Return the expected seconds of that many groups, and of the pilots."""
        rounds = math.ceil(max(0, groups) / self.cells.world.size)
        cost, o = self.measurement.cost(MIN_GROUPS), self.measurement.options
        pilots = cost.passes - MIN_GROUPS * o.bins + cost.trials * 2 / o.batch_size
        return (self.seconds or 0.0) * (rounds * o.bins + pilots)

    def check_budget(self) -> None:
        """Check that the budget holds 5 groups; the error says how long they take."""
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
        """Measure, and return the map; `early` is called once with that of the first groups."""
        measurement, cells, cost = self.measurement, self.cells, self.cost
        o, model = measurement.options, measurement.model
        width = measurement.parameters if measurement.is_exact else self.sketch.width
        if cells.checkpoint.folder is not None:
            check_disk_space(cells.checkpoint.folder, cost.bytes)
        cells.progress, cells.total = progress, cost.passes + cost.trials

        def map_of(gram: Array) -> ConflictMap:
            return ConflictMap(measurement.bins, gram, measurement.log_snr, origin)

        def first(rows: Tensor) -> None:
            if early is not None:
                early(map_of(by_cell(products(rows[..., :width].flatten(0, 1)), len(rows))))

        with fitting_threads(model, o.batch_size):
            if cells.fisher is not None:
                cells.fisher.begin(cells.backward.D, model.device)
            origin = measurement.origin(self._choose_noise())
            rule = StopRule(o.budget, o.target_se, cells.took, map_of, width, time.monotonic())
            stop, is_adam = rule if o.is_open else None, o.metric == "adam"
            most = measurement.most_groups
            rows = cells.rows(most, is_adam, self._known_rows(), stop, first)
            return self._map(rows, origin)

    def _choose_noise(self) -> bool | tuple[bool, ...]:
        """Return which bins have antithetic noise, and let the draws have it."""
        if self.measurement.options.antithetic != "auto":
            return self.measurement.options.antithetic == "on"
        before = None if self.start is None else self.start.origin.antithetic
        chosen = before if isinstance(before, tuple) else self.cells.noise()
        self.cells.draws = replace(self.cells.draws, antithetic=chosen)
        return chosen

    def _known_rows(self) -> Tensor | None:
        """Return the rows of the map to be extended, [M N *]."""
        sketches = self._start_sketches
        if self.start is None or sketches is None:
            return None
        parts = [sketches]
        if self.measurement.is_exact:
            parts = [sketches * self.sketch.signs.cpu().numpy()]
        elif self.measurement.options.layers and self.start.layers is not None:
            parts.append(self.start.layers)
        return torch.from_numpy(np.concatenate(parts, axis=2)).transpose(0, 1)

    def _map(self, rows: Tensor, origin: Origin) -> ConflictMap:
        measurement, width = self.measurement, self.sketch.width
        short, whole = rows, rows[..., :width]
        if measurement.is_exact:
            flat, whole = rows.flatten(0, 1), rows
            totals = accumulator((len(flat), self.short.width), rows.device)
            for total, row in zip(totals, flat, strict=True):
                self.short.add(total, 0, row)
            short = totals.float().unflatten(0, rows.shape[:2])
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
    """
    o, model = measurement.options, measurement.model
    if start is not None and start.layers is not None and not o.layers:
        what = f"the map of {start.M} groups has sketches of layers, which more groups would lack"
        raise UsageError(what, fix="add --layers")
    denoiser = measurement.denoiser
    if measurement.lora is None:
        denoiser = copy.deepcopy(denoiser).float()
    denoiser.eval()
    samples = (model.with_denoiser(denoiser), measurement.data, measurement.bins)
    draws = Draws(*samples, o.batch_size, o.seed, o.draws == "shared", o.antithetic == "on")
    backward = Backward(denoiser, measurement.which, measurement.mode)
    sketch = CountSketch.of(backward.D, o.seed, device=model.device)
    layers = sketch.layers(measurement.layout).parts if o.layers else ()
    short = Sketches([(0, sketch), *layers])
    stored = Identity(backward.D) if measurement.is_exact else short
    cells = GradientCollector(
        draws, backward, stored, checkpoint, world, precision=o.mixed_precision, fisher=fisher
    )
    run = Run(measurement, cells, sketch, short, start)
    if timed or o.budget is not None:
        with fitting_threads(model, o.batch_size):
            run = replace(run, seconds=cells.seconds())
    run.check_budget()
    return run
