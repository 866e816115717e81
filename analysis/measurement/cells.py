"""The cells of a conflict map, group after group: one backward pass each, of which a row is kept.

A row is the gradient of the cell's loss, or a count sketch of it, in the adam metric scaled by v^(-1/4) beforehand. Rows of
a finished group are committed, so that a killed measurement loses one group at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from demerge.analysis.measurement.backward import Backward, Consume
from demerge.analysis.measurement.draws import Draw, Draws
from demerge.analysis.measurement.partial import Partial
from demerge.conflict import Array
from demerge.errors import NumericalError
from demerge.stats.examples import accumulator
from demerge.timesteps import TimestepRange

Progress = Callable[[int, int, str], None]

COLUMNS = 1 << 15


class Keep(Protocol):
    """What is kept of a gradient: a linear map to `width` numbers."""

    @property
    def width(self) -> int:
        """How many numbers."""

    def add(self, total: Tensor, start: int, x: Tensor) -> None:
        """Add what is kept of the coordinates [start, start + n), x [n], to `total` [width] in place."""


@dataclass(frozen=True, slots=True)
class Everything:
    """Keeps the gradient itself, of `width` coordinates."""

    width: int

    def add(self, total: Tensor, start: int, x: Tensor) -> None:
        """Add x [n] to the coordinates [start, start + n) of `total` [width]."""
        total[start : start + len(x)] += x


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Keeps several things of a gradient, one after the other."""

    parts: Sequence[Keep]

    @property
    def width(self) -> int:
        """How many numbers all of them keep."""
        return sum(part.width for part in self.parts)

    def add(self, total: Tensor, start: int, x: Tensor) -> None:
        """Add x [n] to each part."""
        for part, own in zip(self.parts, total.split([part.width for part in self.parts]), strict=True):
            part.add(own, start, x)


@dataclass(slots=True)
class Cells:
    """The cells of a measurement, run through once.

    Attributes:
        keep: what is kept of a gradient.
        total: how many backward passes there will be, for `progress`, called as progress(done, total, what) after each.
        scale: v^(-1/4) [D] of the adam metric.
    """

    draws: Draws
    backward: Backward
    keep: Keep
    partial: Partial
    total: int
    progress: Progress | None = None
    scale: Tensor | None = None
    done: int = 0

    def rows(self, *, adam: bool = False) -> Tensor:
        """Return the gradients or sketches of all cells, [M N *]; each finished group is committed.

        Raises:
            NumericalError: where a gradient is not finite, naming bin, group and sample.
        """
        width, N, M = self.keep.width, len(self.draws.bins), self.draws.groups
        rows = torch.zeros(M, N, width, device=self.draws.model.device)
        if adam:
            self.scale = adam_scale(self.pilot())
        for m in range(M):
            found = self.partial.load(name := f"group-{m:04d}", (N, width))
            if found is not None:
                rows[m] = found.to(rows.device)
                self.done += N
                continue
            self._fill(rows[m], m)
            self.partial.save(name, rows[m])
        return rows

    def pilot(self) -> Tensor:
        """Return v [D], the mean square of each coordinate over a cell of each bin."""
        found = self.partial.load("pilot", (self.backward.D,))
        device = self.draws.model.device
        if found is not None:
            self.done += len(self.draws.bins)
            return found.to(device)
        v = torch.zeros(self.backward.D, device=device)

        def add(start: int, values: Tensor) -> None:
            v[start : start + len(values)] += values.float().square() / len(self.draws.bins)

        for span, draw in zip(self.draws.bins, self.draws.pilot(), strict=True):
            self.backward(draw.loss(self.draws.model, span), add)
            self._refuse_infinite(v, span, "pilot", draw)
            self._tick(f"pilot {span}")
        self.partial.save("pilot", v)
        return v

    def _fill(self, rows: Tensor, m: int) -> None:
        """Put the gradient or sketch of each bin on group m into rows [N *]."""
        for row, span, draw in zip(rows, self.draws.bins, self.draws.group(m), strict=True):
            total = accumulator((self.keep.width,), row.device)
            self.backward(draw.loss(self.draws.model, span), self._weighed(partial(self.keep.add, total)))
            row.copy_(total)
            self._refuse_infinite(row, span, f"group {m}", draw)
            self._tick(f"bin {span}")

    def _weighed(self, consume: Consume) -> Consume:
        """Scale the pieces as the metric says before they are consumed."""
        scale = self.scale
        if scale is None:
            return consume
        return lambda start, values: consume(start, values.float() * scale[start : start + len(values)])

    def _tick(self, what: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, what)

    def _refuse_infinite(self, values: Tensor, span: TimestepRange, where: str, draw: Draw) -> None:
        """Refuse a cell by the first of its samples whose gradient is not finite; a sketch of it is not finite either."""
        if bool(values.isfinite().all()):
            return
        found = next((b for b in range(len(draw.images)) if not self._is_finite(draw.only(b), span)), None)
        sample = "though that of each sample is"
        if found is not None:
            image, t = draw.images[found], int(draw.timesteps(span)[found])
            sample = f"at sample {found} (image {image} of {self.draws.data.name}, t = {t})"
        raise NumericalError(
            f"the gradient in bin {span}, {where}, is not finite, {sample}", fix="check the model's weights and this image"
        )

    def _is_finite(self, draw: Draw, span: TimestepRange) -> bool:
        found: list[bool] = []
        self.backward(draw.loss(self.draws.model, span), lambda _, values: found.append(bool(values.isfinite().all())))
        return all(found)


def products(rows: Tensor) -> Array:
    """Return the inner products [R R] of the rows of [R D], blocks of float32 products summed in float64."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for block in rows.split(COLUMNS, dim=1):
        gram += (block @ block.T).cpu().double()
    found: Array = ((gram + gram.T) / 2).numpy()
    return found


def adam_scale(v: Tensor) -> Tensor:
    """Return v^(-1/4) [D] of mean squares v [D]; 1 where v = 0 and there is nothing to scale by."""
    return torch.where(v > 0, v, 1).sqrt().rsqrt()
