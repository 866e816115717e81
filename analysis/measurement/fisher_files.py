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
    parameters: int

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.folder / str(span) / f"{NAME}.safetensors" for span in self.fisher.ranges]

    @property
    def bytes(self) -> int:
        """What the sums and the current cell take."""
        return 4 * self.fisher.vectors * self.parameters

    def exist(self) -> bool:
        """Return whether all files exist with all groups; those of fewer groups are made again.

        Raises:
            UsageError: if one was made with other settings.
        """
        wanted, complete = self.fisher.groups, True
        for span in self.fisher.ranges:
            groups = min(self._recorded_groups(span), wanted)
            folder, options = self.folder / str(span), self._options(span, groups)
            same = has_statistic(folder, NAME, self.inputs[span], options)
            complete = complete and same and groups == wanted
        return complete

    def write(self, denoiser: nn.Module) -> list[Path]:
        """Write the files, each with its record, of the groups that the sums hold."""
        k, groups = self.fisher.parts, self.fisher.done
        facts = {"gradients": f"{k} microbatches a cell", "batch": self.fisher.batch_size // k}
        for r, span in enumerate(self.fisher.ranges):
            collected = Collected(self.fisher.means(r, denoiser), facts)
            folder, options = self.folder / str(span), self._options(span, groups)
            commit_statistic(folder, NAME, collected, self.inputs[span], options)
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
        k, wanted = self.fisher.parts, self.fisher.groups
        passes = "each cell is an example"
        if k > 1:
            passes = f"{k} passes of {self.fisher.batch_size // k} samples for each cell"
        text = f"fisher    {self.fisher.ranges}: {passes}, {self.bytes / 1e6:,.0f} MB of sums"
        text = f"{text}, into {self.folder}"
        older = {self._recorded_groups(span) for span in self.fisher.ranges} - {wanted}
        if older:
            text += f", in place of the one of {' and '.join(map(str, sorted(older)))} groups"
        return text


def plan_fisher(
    measurement: Measurement, ranges: str, out: Path, world: World = ALONE
) -> FisherFiles:
    """Plan the Fisher of ranges that a measurement computes too, and check it.

    Args:
        ranges: uniform:N, joint or a partition.json.
        out: the folder of the map; the Fisher goes into OUT/fisher.
        world: the processes that share the groups.

    Raises:
        UsageError: if the samples of a cell are not independent, ranges do not fit bins, or not all
            parameters count.
        ResourceError: if memory or disk does not suffice for the sums.
    """
    model, o = measurement.model, measurement.options
    if o.mixed_precision != "no":
        raise UsageError("the Fisher needs float32", fix="leave out --mixed-precision")
    if o.antithetic != "off":
        what = "the Fisher needs independent samples; antithetic ones are not"
        raise UsageError(what, fix="leave out --antithetic")
    if o.params != "all":
        what = f"the Fisher of params '{o.params}' alone does not merge a model"
        raise UsageError(what, fix="leave out --params")
    spans = Partition.parse(ranges, model.T)
    edges = [0, *spans.cuts, spans.total]
    key = {**measurement.key(), NAME: edges, "parts": MAX_PARTS}
    fisher = RangeFisher(
        spans,
        measurement.bins,
        measurement.most_groups,
        o.batch_size,
        MeasurementCheckpoint(out / "conflict.partial" / NAME, key),
        world,
    )
    options = {"bins": o.bins, "batch_size": o.batch_size, "draws": o.draws, "seed": o.seed}
    inputs = {span: inputs_of(model.sha256, measurement.data, span) for span in spans}
    files = FisherFiles(fisher, out / NAME, inputs, options, model.parameters)
    if not files.exist():
        fisher.checkpoint.check()
        free = free_bytes(str(model.device))
        if free is not None and free < files.bytes:
            raise ResourceError(
                f"the sums of the Fisher take {files.bytes:,} bytes on {model.device},"
                f" {free:,} are free",
                fix="take fewer ranges, or another device",
            )
        check_disk_space(out / NAME, 3 * files.bytes)
    return files
