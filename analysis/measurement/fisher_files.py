"""The files of the Fisher of ranges: FOLDER/0000-0250/fisher.safetensors, as of `demerge stats`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.fisher import MAX_PARTS, RangeFisher
from demerge.analysis.measurement.gradients import Measurement
from demerge.device import free_bytes
from demerge.errors import InputError, ResourceError, UsageError
from demerge.parallel import ALONE, World
from demerge.provenance import made_as
from demerge.statistics import Collected, commit_statistic, inputs_of
from demerge.statistics.record import has_statistic
from demerge.storage.atomic import check_disk_space
from demerge.timesteps import Partition, TimestepRange

NAME = "fisher"


@dataclass(frozen=True, slots=True, eq=False)
class FisherFiles:
    """Where the Fisher of each range goes, and what it is of."""

    fisher: RangeFisher
    folder: Path
    inputs: Mapping[TimestepRange, Mapping[str, Any]]
    options: Mapping[str, Any]
    bytes: int  # of the sums and the current cell

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.folder / str(span) / f"{NAME}.safetensors" for span in self.fisher.ranges]

    def exist(self) -> bool:
        """Return whether all files exist with all groups; those of fewer groups are made again."""
        wanted, complete = self.fisher.groups, True
        for span in self.fisher.ranges:
            groups = min(self._recorded_groups(span), wanted)
            folder, options = self.folder / str(span), self._options(span, groups)
            same = has_statistic(folder, NAME, self.inputs[span], options)
            complete = complete and same and groups == wanted
        return complete

    def write(self, denoiser: nn.Module) -> list[Path]:
        """Write the files, each with its record, of the groups that the sums hold."""
        k = self.fisher.parts
        facts = {"gradients": f"{k} microbatches a cell", "batch": self.fisher.batch_size // k}
        for r, span in enumerate(self.fisher.ranges):
            collected = Collected(self.fisher.means(r, denoiser), facts)
            options = self._options(span, self.fisher.done)
            commit_statistic(self.folder / str(span), NAME, collected, self.inputs[span], options)
        return self.paths

    def _options(self, span: TimestepRange, groups: int) -> dict[str, Any]:
        bins = sum(bin.start in span for bin in self.fisher.bins)
        samples = bins * groups * self.fisher.batch_size
        return {"samples": samples, "groups": groups, **self.options}

    def _recorded_groups(self, span: TimestepRange) -> int:
        """Return the number of groups of a range's file, the wanted number if there is none."""
        try:
            made = made_as(self.folder / str(span), NAME)
            groups = made.options["groups"] if made else None
        except (InputError, KeyError):
            groups = None
        return groups if type(groups) is int else self.fisher.groups

    def __str__(self) -> str:
        k, text = self.fisher.parts, f"fisher    {self.fisher.ranges}: each cell is an example"
        if k > 1:
            samples = self.fisher.batch_size // k
            text = f"fisher    {self.fisher.ranges}: {k} passes of {samples} samples for each cell"
        text += f", {self.bytes / 1e6:,.0f} MB of sums, into {self.folder}"
        recorded = {self._recorded_groups(span) for span in self.fisher.ranges}
        older = sorted(recorded - {self.fisher.groups})
        if older:
            text += f", in place of the one of {' and '.join(map(str, older))} groups"
        return text


def plan_fisher(
    measurement: Measurement, ranges: str | Path, out: str | Path, world: World = ALONE
) -> FisherFiles:
    """Plan the Fisher of ranges that a measurement computes too, and check it.

    Args:
        ranges: a text for `Partition.parse`.
        out: the folder of the map; the Fisher goes into OUT/fisher.
        world: the processes that share the groups.

    Raises:
        UsageError: if the samples of a cell are not independent, ranges do not fit bins, or not all
            parameters count.
        ResourceError: if memory or disk does not suffice for the sums.
    """
    model, o, out = measurement.model, measurement.options, Path(out)
    if o.mixed_precision != "no":
        raise UsageError("the Fisher needs float32", fix="leave out --mixed-precision")
    if o.antithetic != "off":
        what = "the Fisher needs independent samples; antithetic ones are not"
        raise UsageError(what, fix="leave out --antithetic")
    if o.params != "all":
        what = f"the Fisher of params '{o.params}' alone does not merge a model"
        raise UsageError(what, fix="leave out --params")
    spans, groups = Partition.parse(str(ranges), model.T), measurement.most_groups
    key = {**measurement.key(), NAME: [0, *spans.cuts, spans.total], "parts": MAX_PARTS}
    checkpoint = MeasurementCheckpoint(out / "conflict.partial" / NAME, key)
    fisher = RangeFisher(spans, measurement.bins, groups, o.batch_size, checkpoint, world)
    options = {"bins": o.bins, "batch_size": o.batch_size, "draws": o.draws, "seed": o.seed}
    inputs = {span: inputs_of(model.sha256, measurement.data, span) for span in spans}
    size = 4 * fisher.vectors * model.parameters
    files = FisherFiles(fisher, out / NAME, inputs, options, size)
    if not files.exist():
        fisher.checkpoint.check()
        free = free_bytes(str(model.device))
        if free is not None and free < size:
            what = f"the sums of the Fisher take {size:,} bytes, {model.device} has {free:,} free"
            raise ResourceError(what, fix="take fewer ranges, or another device")
        check_disk_space(out / NAME, 3 * size)
    return files
