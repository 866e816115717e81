"""The diagonal Fisher of ranges, from the very passes that measure the map: `analyze --fisher`.

    F_R [D] = E[g^2]     g = grad_theta |y - f(x_t, t, c)|^2, t ~ U(R)

as `demerge.statistics.range_fisher`. The B samples of a cell go through the model in k microbatches
instead of at once: x_j [D] is the gradient of the j-th one's mean loss, divided by k, and
s = sum_j x_j is the cell's own gradient. The samples are independent, so that for each coordinate
E s^2 = mu^2 + V/B and E k sum_j x_j^2 = mu^2 + k V/B, with mu the mean and V the variance of g.
Hence

    F = mu^2 + V  is estimated by  s^2 + (B-1)/(k-1) (k sum_j x_j^2 - s^2)

without bias and never below 0, by each cell alone; k = B gives the mean of the squares of all
examples. Over the cells of a range it is averaged by the widths of their bins. An estimate from the
M gradients s of a bin instead of within a cell would need their sum for each bin, [N D]; here each
range has one accumulator, [R D] in all, and each cell adds k - 1 degrees of freedom. Bins have
means of their own in either case.

What is not seen is how mu varies within a bin, since all microbatches have timesteps from all of
it: F lacks the variance of mu over the bin. Samples that are not independent within a cell are
an error. Draws that bins share make their errors alike, so that more microbatches are worth more:
docs/studies.md has the numbers for k = 2, 4 and 8.

The cells of a group are summed by themselves, and the groups one after the other, so that the sums
do not depend on how many processes share the groups. They are committed after each group:
OUT/conflict.partial/fisher/0003.safetensors are those of the groups up to 3. The finished Fisher is
their mean, from which they do not come back to the bit: one of more groups is measured from the
first group on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from demerge.analysis.measurement.backward import Backward, Consume
from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.samples import Draw
from demerge.errors import UsageError
from demerge.parallel import ALONE, World
from demerge.statistics.fisher import by_state_name
from demerge.timesteps import Partition, TimestepRange

Loss = Callable[[Draw, TimestepRange], Tensor]

MAX_PARTS = 8


@dataclass(slots=True, eq=False)
class RangeFisher:
    """The Fisher of each range, while cells of M groups of B samples are measured."""

    ranges: Partition
    bins: Partition
    groups: int  # M, or the most there may be
    batch_size: int
    checkpoint: MeasurementCheckpoint
    world: World = ALONE  # the processes that share the groups
    done: int = 0  # how many groups, from the first, the sums hold
    sums: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # over the groups, [R D]
    part: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # of the current group

    def __post_init__(self) -> None:
        inside = sorted(set(self.ranges.cuts) - set(self.bins.cuts))
        if inside or self.ranges.total != self.bins.total:
            edges = ", ".join(map(str, inside))
            what = f"the ranges {self.ranges} of the Fisher have edges inside of bins: {edges}"
            fix = f"choose other --bins, or ranges with boundaries among {self.bins.cuts}"
            raise UsageError(what, fix=fix)
        if self.batch_size > 1 and self.parts == 1:
            what = f"the Fisher needs 2 to {MAX_PARTS} equal parts of a batch of {self.batch_size}"
            raise UsageError(what, fix="give an even --batch-size")

    @property
    def parts(self) -> int:
        """k, the number of microbatches of a cell."""
        return next(k for k in range(MAX_PARTS, 0, -1) if self.batch_size % k == 0)

    @property
    def vectors(self) -> int:
        """How many vectors of D numbers it takes: sums, parts, and three of current passes."""
        R = len(self.ranges)
        return 2 * R + 3 if self.world.size > 1 else R + 3

    @property
    def committed(self) -> int:
        """How many groups, from the first, an earlier call has committed."""
        stored = (m for m in reversed(range(self.groups)) if self.checkpoint.has(f"{m:04d}"))
        return next(stored, -1) + 1

    def begin(self, D: int, device: torch.device) -> None:
        """Make room for D coordinates, and load what an earlier call committed."""
        R = len(self.ranges)
        self.sums, self.done = torch.zeros(R, D, device=device), 0
        self.part = torch.zeros(R if self.world.size > 1 else 1, D, device=device)
        for m in reversed(range(self.groups if self.world.is_main else 0)):
            sums = self.checkpoint.load(f"{m:04d}", self.sums.shape)
            if sums is not None:
                self.sums, self.done = sums.to(device), m + 1
                break
        self.done = int(self.world.broadcast_number(self.done, device))
        self.world.broadcast(self.sums)

    def add_cell(
        self, m: int, i: int, draw: Draw, loss: Loss, backward: Backward, consume: Consume
    ) -> None:
        """Run the backward passes of bin i and group m, `consume` its gradient, and add to F."""
        B, k, span = self.batch_size, self.parts, self.bins[i]
        s, squares = self.passes(draw, span, loss, backward, consume)
        if m < self.done:
            return
        r = self.ranges.route(span.start)
        weight, total = len(span) / len(self.ranges[r]), self.part[r % len(self.part)]
        total.addcmul_(s, s, value=weight)
        if k > 1:
            spread = squares.mul_(k).addcmul_(s, s, value=-1)
            spread.clamp_(min=0)  # below 0 by rounding only
            total.add_(spread, alpha=weight * (B - 1) / (k - 1))
        if self.world.size == 1 and span.stop == self.ranges[r].stop:
            self._add_part(r, 0)

    def passes(
        self, draw: Draw, span: TimestepRange, loss: Loss, backward: Backward, consume: Consume
    ) -> Tensor:
        """Run the passes of a cell, `consume` its gradient s; return s and sum_j x_j^2, [2 D]."""
        k = self.parts
        both = torch.zeros(2, backward.D, device=draw.x0.device)
        s, squares = both

        def add(start: int, values: Tensor) -> None:
            own, x = slice(start, start + len(values)), values.float()
            s[own] += x
            squares[own].addcmul_(x, x)
            consume(start, values)

        for j in range(k):  # each has timesteps from all of the bin
            backward(loss(draw.select(slice(j, None, k)), span) / k, add)
        return both

    def commit(self, m: int, owner: int) -> None:
        """Add group m of the process that measured it, and commit the sums."""
        if m < self.done:
            return
        for r in range(len(self.ranges) if self.world.size > 1 else 0):
            self._add_part(r, owner)
        if self.world.is_main:
            self.checkpoint.save(f"{m:04d}", self.sums)
            if self.checkpoint.folder is not None and m > 0:
                old = self.checkpoint.folder / f"{m - 1:04d}.safetensors"
                old.unlink(missing_ok=True)
        self.done = m + 1

    def _add_part(self, r: int, owner: int) -> None:
        """Add what the process `owner` has of a group on range r to the sums."""
        own = self.part[r % len(self.part)]
        part = own if owner == self.world.rank else torch.empty_like(self.sums[r])
        self.sums[r] += self.world.broadcast(part, owner)
        part.zero_()

    def means(self, r: int, denoiser: nn.Module) -> dict[str, Tensor]:
        """Return F of range r for each tensor of the state dict, float32 on the CPU."""
        mean, shaped, start = (self.sums[r] / self.done).cpu(), {}, 0
        for name, parameter in denoiser.named_parameters():
            shaped[name] = mean[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        return by_state_name(denoiser, shaped)
