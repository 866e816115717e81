"""A measurement of gradients under way: what is there already, what the rest takes, when it is enough, and the map."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from demerge.analysis.measurement.budget import Stop, by_cell
from demerge.analysis.measurement.collector import GradientCollector, Progress, Reduction, products
from demerge.analysis.measurement.fisher import RangeFisher
from demerge.analysis.measurement.options import duration
from demerge.analysis.measurement.sketch import CountSketch
from demerge.conflict import MIN_GROUPS, Array, ConflictMap, K, Origin
from demerge.diffusion.numerics import accumulator
from demerge.diffusion.threads import fitting_threads
from demerge.errors import ResourceError, UsageError
from demerge.storage.atomic import check_disk_space

if TYPE_CHECKING:
    from demerge.analysis.measurement.gradients import Cost, Measurement


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A measurement that is ready to begin.

    Attributes:
        sketch, short: the sketch of a gradient, alone and with those of its layers.
        start: a map of fewer groups, to be extended. Its groups are measured again if it does not hold what they take: with
            a Fisher, which lies in no map, or if its products are of exact gradients.
        seconds: of the backward passes of a cell, where they were timed.
    """

    measurement: Measurement
    cells: GradientCollector
    sketch: CountSketch
    short: Reduction
    start: ConflictMap | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (
            self.start is not None
            and self.start.layers is not None
            and not self.measurement.settings.layers
        ):
            raise UsageError(
                f"the map of {self.start.M} groups has sketches of layers, which more groups would lack",
                fix="add --layers",
            )

    @property
    def fisher(self) -> RangeFisher | None:
        """The Fisher that takes its share of each cell, where it is asked for."""
        return self.cells.fisher

    @property
    def holds(self) -> bool:
        """Whether the map to be extended holds the rows of its groups: sketches, or gradients no longer than a sketch."""
        of = self.measurement
        return (
            self.fisher is None
            and not (of.exact and of.parameters > K)
            and self.start is not None
            and self.start.sketches is not None
        )

    @property
    def known(self) -> int:
        """How many groups need not be measured, as far as this process sees."""
        there = self.cells.partial.count("group-")
        if self.fisher is not None:
            return min(there, self.fisher.committed)
        return max(self.start.M if self.start is not None and self.holds else 0, there)

    @property
    def cost(self) -> Cost:
        """What it will take; where the number of groups is open, that of as many as the budget holds, or of the most."""
        s, most = self.measurement.settings, self.measurement.most
        if self.seconds is None:
            return replace(self._cost(most), most=s.open)
        if s.budget is not None:
            left = max(0.0, s.budget - self._took(0))
            fitting = self.cells.world.size * int(left / (s.bins * self.seconds))
            most = min(most, max(MIN_GROUPS, self.known + fitting))
        return replace(
            self._cost(most), seconds=self._took(most - self.known), most=s.se is not None
        )

    def _cost(self, groups: int) -> Cost:
        return self.measurement.cost(groups, 1 if self.fisher is None else self.fisher.parts)

    def _took(self, groups: int) -> float:
        """Return the expected seconds of that many groups, and of the pilots."""
        rounds = math.ceil(max(0, groups) / self.cells.world.size)
        cost, s = self.measurement.cost(MIN_GROUPS), self.measurement.settings
        pilots = cost.passes - MIN_GROUPS * s.bins + cost.trials * 2 / s.batch_size
        return (self.seconds or 0.0) * (rounds * s.bins + pilots)

    def check_budget(self) -> None:
        """Refuse a budget that does not hold 5 groups.

        Raises:
            ResourceError: saying how long they take, and what would do.
        """
        s = self.measurement.settings
        needed = self._took(MIN_GROUPS - self.known)
        if s.budget is None or needed <= s.budget:
            return
        share = s.budget / needed
        fewer = [
            f"{option} {number}"
            for option, number in (
                ("--bins", int(s.bins * share)),
                ("--train-batch-size", int(s.batch_size * share) // 2 * 2),
            )
            if number >= 2
        ]
        raise ResourceError(
            f"{MIN_GROUPS} groups of {s.bins} bins take about {duration(needed)}, and the budget is {duration(s.budget)}",
            fix=", or ".join([f"give --budget {math.ceil(needed * 1.1)}s", *fewer]),
        )

    def map(
        self, progress: Progress | None = None, early: Callable[[ConflictMap], None] | None = None
    ) -> ConflictMap:
        """Measure, and return the map.

        Args:
            progress: called after each cell.
            early: called once, with the map of the first groups, 5 or those that were there.

        Raises:
            NumericalError: where a gradient is not finite, naming bin, group and sample.
        """
        of, cells, cost = self.measurement, self.cells, self.cost
        s = of.settings
        if cells.partial.folder is not None:
            check_disk_space(cells.partial.folder, cost.bytes)
        with fitting_threads(of.model, s.batch_size):
            return self._measured(progress, early)

    def _measured(
        self, progress: Progress | None, early: Callable[[ConflictMap], None] | None
    ) -> ConflictMap:
        of, cells, cost = self.measurement, self.cells, self.cost
        s = of.settings
        if self.fisher is not None:
            self.fisher.begin(cells.backward.D, of.model.device)
        cells.progress, cells.total = progress, cost.passes + cost.trials
        origin = of.origin(self._antithetic())
        width = of.parameters if of.exact else self.sketch.width

        def of_gram(gram: Array) -> ConflictMap:
            return ConflictMap(cells.draws.bins, gram, of.log_snr, origin)

        stop = (
            Stop(s.budget, s.se, cells.took, of_gram, width, time.monotonic()) if s.open else None
        )

        def first(rows: Tensor) -> None:
            if early is not None:
                early(of_gram(by_cell(products(rows[..., :width].flatten(0, 1)), len(rows))))

        rows = cells.rows(
            of.most, adam=s.metric == "adam", start=self._rows(), enough=stop, first=first
        )
        return self._map(rows, origin)

    def _antithetic(self) -> bool | tuple[bool, ...]:
        """Return which bins have antithetic noise, and let the draws have it."""
        if self.measurement.settings.antithetic != "auto":
            return self.measurement.settings.antithetic == "on"
        before = None if self.start is None else self.start.origin.antithetic
        chosen = before if isinstance(before, tuple) else self.cells.noise()
        self.cells.draws = replace(self.cells.draws, antithetic=chosen)
        return chosen

    def _rows(self) -> Tensor | None:
        """Return the rows of the map to be extended, [M N *]; where a sketch keeps all coordinates it is the gradient."""
        if self.start is None or self.start.sketches is None or not self.holds:
            return None
        parts = [self.start.sketches]
        if self.measurement.exact:
            parts = [self.start.sketches * self.sketch.signs.cpu().numpy()]
        elif self.measurement.settings.layers and self.start.layers is not None:
            parts.append(self.start.layers)
        return torch.from_numpy(np.concatenate(parts, axis=2)).transpose(0, 1)

    def _map(self, rows: Tensor, origin: Origin) -> ConflictMap:
        of, width = self.measurement, self.sketch.width
        whole, short = (
            (rows, _shortened(rows, self.short)) if of.exact else (rows[..., :width], rows)
        )
        gram = by_cell(products(whole.flatten(0, 1)), len(rows))
        kept = short.transpose(0, 1).cpu().numpy()
        layers = kept[..., width:] if of.settings.layers else None
        return ConflictMap(
            self.cells.draws.bins, gram, of.log_snr, origin, of.layout, kept[..., :width], layers
        )


def _shortened(rows: Tensor, keep: Reduction) -> Tensor:
    """Return what is kept [M N width] of gradients [M N D]."""
    flat = rows.flatten(0, 1)
    found = accumulator((len(flat), keep.width), rows.device)
    for total, row in zip(found, flat, strict=True):
        keep.add(total, 0, row)
    short: Tensor = found.float().unflatten(0, rows.shape[:2])
    return short
