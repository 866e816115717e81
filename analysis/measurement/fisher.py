"""The diagonal Fisher of ranges, from the very passes that measure the map: `analyze --fisher`.

    F_R [D] = E[g^2]     g = grad_theta |y - f(x_t, t, c)|^2, t ~ U(R)   (as `demerge.statistics.range_fisher`)

The B samples of a cell go through the model in k microbatches instead of at once: x_j [D] is the gradient of the j-th one's
mean loss, divided by k, and s = sum_j x_j is the cell's own gradient. The samples are independent, so that for each coordinate
E s^2 = mu^2 + V/B and E k sum_j x_j^2 = mu^2 + k V/B, with mu the mean and V the variance of g. Hence

    F = mu^2 + V  is estimated by  s^2 + (B-1)/(k-1) (k sum_j x_j^2 - s^2)

without bias and never below 0, by each cell alone; k = B gives the mean of the squares of all examples. Over the cells of a
range it is averaged by the widths of their bins. An estimate from the M gradients s of a bin instead of within a cell
would need their sum for each bin, [N D]; here each range has one accumulator, [R D] in all, and each cell adds k - 1 degrees
of freedom. Bins have means of their own in either case.

What is not seen is how mu varies within a bin, since all microbatches have timesteps from all of it: F lacks the variance of
mu over the bin. Samples that are not independent within a cell are refused. Draws that bins share make their errors alike,
so that more microbatches are worth more: digits base, 20 bins, 8 groups of 16, against 2048 examples one by one:

    k                    2            4            8            256 examples one by one (`demerge stats`)
    trace, 4 ranges      0.60-1.10    0.70-0.98    0.94-1.04    0.96-1.04
    |dtheta - theirs|    0.120        0.097        0.090        0.143     of `merge --method fisher`, relative; average 0.82

The cells of a group are summed by themselves, and the groups one after the other, so that the sums do not depend on how many
processes share the groups. They are committed after each group, OUT/conflict.partial/fisher/0003.safetensors: those of the
groups up to 3. The finished Fisher is their mean, from which they do not come back to the bit: one of more groups is
measured from the first group on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from demerge.analysis.measurement.backward import Backward, Consume
from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.draws import Draw
from demerge.analysis.measurement.parallel import ALONE, World
from demerge.device import free_bytes
from demerge.errors import InputError, ResourceError, UsageError
from demerge.provenance import made_as
from demerge.statistics import Collected, commit_statistic, inputs_of
from demerge.statistics.fisher import by_state_name
from demerge.statistics.record import has_statistic
from demerge.storage.atomic import check_disk_space
from demerge.timesteps import Partition, TimestepRange

if TYPE_CHECKING:
    from demerge.analysis.measurement.gradients import Measurement

Loss = Callable[[Draw, TimestepRange], Tensor]

PARTS = 8
NAME = "fisher"


@dataclass(slots=True, eq=False)
class RangeFisher:
    """The Fisher of each range of a partition, as cells of M groups of B samples are run through.

    Attributes:
        groups: M, or the most there may be.
        world: the processes that share the groups.
        done: how many groups, from the first, the sums hold.
        sums: over the groups, [R D].
        part: over the cells of the group at hand, [R D]; of one process alone those of the range at hand, [1 D].

    Raises:
        UsageError: where an edge of a range is none of the bins, or B samples do not make microbatches.
    """

    ranges: Partition
    bins: Partition
    groups: int
    batch_size: int
    partial: MeasurementCheckpoint
    world: World = ALONE
    done: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    part: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def __post_init__(self) -> None:
        inside = sorted(set(self.ranges.cuts) - set(self.bins.cuts))
        if inside or self.ranges.total != self.bins.total:
            raise UsageError(
                f"the ranges {self.ranges} of the Fisher have edges inside of bins: {', '.join(map(str, inside))}",
                fix=f"choose --bins so that each range has whole ones, or ranges with cuts among {self.bins.cuts}",
            )
        if self.batch_size > 1 and self.parts == 1:
            raise UsageError(
                f"batch size {self.batch_size} has no 2 to {PARTS} equal parts, which the Fisher is taken from",
                fix="give an even one",
            )

    @property
    def parts(self) -> int:
        """k, the number of microbatches of a cell."""
        return next(k for k in range(PARTS, 0, -1) if self.batch_size % k == 0)

    @property
    def vectors(self) -> int:
        """How many vectors of D numbers it takes: sums, parts, two of the cell at hand, and one of another process."""
        R = len(self.ranges)
        return 2 * R + 3 if self.world.size > 1 else R + 3

    @property
    def committed(self) -> int:
        """How many groups, from the first, an earlier call has committed."""
        return next(
            (m + 1 for m in reversed(range(self.groups)) if self.partial.has(f"{m:04d}")), 0
        )

    def samples(self, span: TimestepRange, groups: int) -> int:
        """Return how many examples the Fisher of a range is taken from."""
        return sum(own.start in span for own in self.bins) * groups * self.batch_size

    def begin(self, D: int, device: torch.device) -> None:
        """Make room for D coordinates, and take up what an earlier call committed."""
        R = len(self.ranges)
        self.sums, self.done = torch.zeros(R, D, device=device), 0
        self.part = torch.zeros(R if self.world.size > 1 else 1, D, device=device)
        for m in reversed(range(self.groups if self.world.main else 0)):
            found = self.partial.load(f"{m:04d}", self.sums.shape)
            if found is not None:
                self.sums, self.done = found.to(device), m + 1
                break
        self.done = int(self.world.agree(self.done, device))
        self.world.share(self.sums)

    def holds(self, m: int) -> bool:
        """Whether the sums hold group m."""
        return m < self.done

    def cell(
        self, m: int, i: int, draw: Draw, loss: Loss, backward: Backward, consume: Consume
    ) -> None:
        """Run the backward passes of the cell of bin i and group m, `consume` its gradient, and add to the Fisher."""
        B, k, span = self.batch_size, self.parts, self.bins[i]
        s, squares = self.passes(draw, span, loss, backward, consume)
        if self.holds(m):
            return
        r = self._of(i)
        weight, total = len(span) / len(self.ranges[r]), self.part[r % len(self.part)]
        total.addcmul_(s, s, value=weight)
        if k > 1:
            spread = (
                squares.mul_(k).addcmul_(s, s, value=-1).clamp_(min=0)
            )  # below 0 by rounding only
            total.add_(spread, alpha=weight * (B - 1) / (k - 1))
        if self.world.size == 1 and span.stop == self.ranges[r].stop:
            self._take(r, 0)

    def passes(
        self, draw: Draw, span: TimestepRange, loss: Loss, backward: Backward, consume: Consume
    ) -> Tensor:
        """Run the backward passes of a cell, `consume` its gradient s, and return s and sum_j x_j^2, [2 D]."""
        k = self.parts
        s, squares = found = torch.zeros(2, backward.D, device=draw.x0.device)

        def add(start: int, values: Tensor) -> None:
            own, x = slice(start, start + len(values)), values.float()
            s[own] += x
            squares[own].addcmul_(x, x)
            consume(start, values)

        for j in range(k):
            backward(loss(every(draw, j, k), span) / k, add)
        return found

    def commit(self, m: int, owner: int) -> None:
        """Take group m from the process that has measured it, and commit the sums, which hold all before it."""
        if self.holds(m):
            return
        for r in range(len(self.ranges) if self.world.size > 1 else 0):
            self._take(r, owner)
        if self.world.main:
            self.partial.save(f"{m:04d}", self.sums)
            if self.partial.folder is not None and m > 0:
                (self.partial.folder / f"{m - 1:04d}.safetensors").unlink(missing_ok=True)
        self.done = m + 1

    def _take(self, r: int, owner: int) -> None:
        """Add what the process `owner` has of a group on range r to the sums."""
        part = (
            self.part[r % len(self.part)]
            if owner == self.world.rank
            else torch.empty_like(self.sums[r])
        )
        self.sums[r] += self.world.share(part, owner)
        part.zero_()

    def means(self, r: int, denoiser: nn.Module) -> dict[str, Tensor]:
        """Return F of range r for each tensor of the state dict, float32 on the CPU."""
        parameters = dict(denoiser.named_parameters())
        pieces = (self.sums[r] / self.done).cpu().split([p.numel() for p in parameters.values()])
        found = {
            name: piece.view(p.shape)
            for (name, p), piece in zip(parameters.items(), pieces, strict=True)
        }
        return by_state_name(denoiser, found)

    def _of(self, i: int) -> int:
        """Return the range of bin i."""
        return self.ranges.route(self.bins[i].start)


def every(draw: Draw, j: int, k: int) -> Draw:
    """Return the samples j, j + k, ... of a draw: timesteps from all of the bin, as the whole draw has."""
    keep = slice(j, None, k)
    condition = None if draw.condition is None else draw.condition[keep]
    return Draw(draw.images[keep], draw.x0[keep], condition, draw.noise[keep], draw.position[keep])


@dataclass(frozen=True, slots=True, eq=False)
class FisherFiles:
    """Where the Fisher of each range goes, FOLDER/0000-0250/fisher.safetensors as of `demerge stats`, and what it is of."""

    fisher: RangeFisher
    folder: Path
    inputs: Mapping[TimestepRange, Mapping[str, Any]]
    options: Mapping[str, Any]
    parameters: int

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.folder / str(span) / f"{NAME}.safetensors" for span in self.fisher.ranges]

    @property
    def bytes(self) -> int:
        """What the sums and the cell at hand take."""
        return 4 * self.fisher.vectors * self.parameters

    def are_there(self) -> bool:
        """Return whether all files are there; one of fewer groups is to be made again.

        Raises:
            UsageError: where one was made otherwise.
        """
        groups = {
            span: min(self._recorded(span), self.fisher.groups) for span in self.fisher.ranges
        }
        there = [
            has_statistic(self.folder / str(s), NAME, self.inputs[s], self._said(s, n))
            for s, n in groups.items()
        ]
        return all(there) and set(groups.values()) == {self.fisher.groups}

    def write(self, denoiser: nn.Module) -> list[Path]:
        """Write the files, each with its record, of the groups that the sums hold."""
        k, groups = self.fisher.parts, self.fisher.done
        facts = {"gradients": f"{k} microbatches a cell", "batch": self.fisher.batch_size // k}
        for r, span in enumerate(self.fisher.ranges):
            collected = Collected(self.fisher.means(r, denoiser), facts)
            commit_statistic(
                self.folder / str(span),
                NAME,
                collected,
                self.inputs[span],
                self._said(span, groups),
            )
        return self.paths

    def _said(self, span: TimestepRange, groups: int) -> dict[str, Any]:
        return {"samples": self.fisher.samples(span, groups), "groups": groups, **self.options}

    def _recorded(self, span: TimestepRange) -> int:
        """Return of how many groups the file of a range is, or of those that are asked for where there is none."""
        try:
            made = made_as(self.folder / str(span), NAME)
            groups = made.options["groups"] if made else None
        except (InputError, KeyError):
            groups = None
        return groups if type(groups) is int else self.fisher.groups

    def __str__(self) -> str:
        k, b = self.fisher.parts, self.fisher.batch_size // self.fisher.parts
        passes = f"{k} passes of {b} samples for each cell" if k > 1 else "each cell is an example"
        before = sorted(
            {n for span in self.fisher.ranges if (n := self._recorded(span)) != self.fisher.groups}
        )
        instead = (
            f", in place of the one of {' and '.join(map(str, before))} groups" if before else ""
        )
        where = f"{self.bytes / 1e6:,.0f} MB of sums, into {self.folder}{instead}"
        return f"fisher    {self.fisher.ranges}: {passes}, {where}"


def fisher_files(
    measurement: Measurement, ranges: str, out: Path, world: World = ALONE
) -> FisherFiles:
    """Prepare the Fisher of ranges beside a measurement, and check it.

    Args:
        ranges: uniform:N, joint or a partition.json.
        out: the folder of the map; the Fisher goes into OUT/fisher.
        world: the processes that share the groups.

    Raises:
        UsageError: where the samples of a cell are not independent, ranges do not fit bins, or not all parameters count.
        ResourceError: where memory or disk does not suffice for the sums.
    """
    model, s = measurement.model, measurement.settings
    if s.precision != "no":
        raise UsageError("the Fisher is taken in float32", fix="leave out --mixed-precision")
    if s.antithetic != "off":
        raise UsageError(
            "antithetic samples are not independent, and the Fisher needs such",
            fix="leave out --antithetic",
        )
    if s.params != "all":
        raise UsageError(
            f"the Fisher of params '{s.params}' alone does not merge a model",
            fix="leave out --params",
        )
    spans = Partition.parse(ranges, model.T)
    edges = [0, *spans.cuts, spans.total]
    own = MeasurementCheckpoint(
        out / "conflict.partial" / NAME, {**measurement.key(), NAME: edges, "parts": PARTS}
    )
    fisher = RangeFisher(
        spans, Partition.uniform(model.T, s.bins), measurement.most, s.batch_size, own, world
    )
    options = {name: getattr(s, name) for name in ("bins", "batch_size", "draws", "seed")}
    sha256 = model.sha256
    inputs = {span: inputs_of(sha256, measurement.data, span) for span in spans}
    made = FisherFiles(fisher, out / NAME, inputs, options, model.parameters)
    if not made.are_there():
        own.check()
        free = free_bytes(str(model.device))
        if free is not None and free < made.bytes:
            raise ResourceError(
                f"the sums of the Fisher take {made.bytes:,} bytes on {model.device}, {free:,} are free",
                fix="take fewer ranges, or another device",
            )
        check_disk_space(out / NAME, 3 * made.bytes)
    return made
