"""The stage of `demerge analyze`: an earlier map is used or extended, the rest measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from demerge.analysis.measurement.budget import describe_se, neighbour_se
from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.fisher_files import FisherFiles, plan_fisher
from demerge.analysis.measurement.gradients import Measurement, MeasurementCost
from demerge.analysis.measurement.options import (
    AnalyzeInputs,
    MeasurementOptions,
)
from demerge.analysis.measurement.run import Run, begin
from demerge.analysis.measurement.schedule import describe_schedule
from demerge.analysis.partitioning.map_reading import Reading
from demerge.analysis.partitioning.options import PartitionOptions
from demerge.analysis.partitioning.resolution import LEAST_KNOWN
from demerge.analysis.partitioning.sample_size import MOST, sample_size
from demerge.analysis.report.next_steps import CommandNames
from demerge.analysis.report.page import write_report
from demerge.analysis.report.summary import ConflictSummary, summarize
from demerge.conflict import ConflictMap
from demerge.device import resolve_device
from demerge.diffusion.model import Diffusion
from demerge.durations import format_seconds
from demerge.errors import ResourceError, UsageError
from demerge.parallel import ALONE, World, join
from demerge.progress import Progress, silent
from demerge.provenance import list_differences
from demerge.stage import Cost
from demerge.storage.atomic import place_for
from demerge.storage.lock import lock_folder

MAP, PARTIAL = "conflict.safetensors", "conflict.partial"


@dataclass(frozen=True, slots=True)
class AnalysisResult:
    """What an analysis found, and the files it wrote.

    Attributes:
        target_se: the SE that was wanted, if any.
    """

    map: ConflictMap
    summary: ConflictSummary
    out: Path
    files: list[Path]
    target_se: float | None = None

    def lines(self) -> list[str]:
        """Return the result for a person."""
        text = self.summary.lines()
        if self.target_se is not None:
            text.append(f"{'target SE':12}  {describe_se(self.map, self.target_se)}")
        return text

    def document(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {"out": self.out, "files": self.files, **self.summary.document()}


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything one analysis needs.

    Attributes:
        checkpoint: OUT/conflict.partial, the finished groups.
        map: the map in OUT, if it is the one that was asked for.
        pending: what is to be measured: a map, more groups for it, or a Fisher; None for nothing.
        fisher: the Fisher that is wanted; its files exist if there is no run.
        world: the processes that share the work; the first one writes.
        condition: what the denoiser is given besides the images, in words.
        tell: called during the run with a line on a map that will say little.
    """

    inputs: AnalyzeInputs
    partition: PartitionOptions
    measurement: Measurement
    checkpoint: MeasurementCheckpoint
    map: ConflictMap | None
    pending: Run | None
    fisher: FisherFiles | None = None
    world: World = ALONE
    condition: str | None = None
    tell: Callable[[str], None] | None = None

    @property
    def out(self) -> Path:
        """The folder of the results."""
        return self.inputs.out

    @property
    def measurement_cost(self) -> MeasurementCost:
        """What the measurement takes."""
        return self.measurement.cost() if self.pending is None else self.pending.cost

    def cost(self) -> Cost:
        """Return what is left to do; the steps are backward passes."""
        cost = self.measurement_cost
        steps = cost.passes + cost.trials
        return Cost(steps=steps, seconds=cost.seconds, memory=cost.bytes, disk=cost.bytes)

    def describe(self) -> list[str]:
        """Return what will be done, for a person."""
        if self.pending is None:
            groups = ""
            if self.map is not None:
                groups = f", with {self.map.M} groups; --groups N adds to them"
            return [f"cost      nothing: the map of this measurement exists already{groups}"]
        o, start = self.measurement.options, self.pending.start
        cost = f"cost      {self.measurement_cost}; batches of {o.batch_size}"
        if self._repeated_groups > 0:
            missing = "exact gradients" if self.fisher is None else "the sums of the Fisher"
            cost += f"; {self._repeated_groups} groups of the map are measured again, as it lacks"
            cost += f" {missing}"
        elif start is not None:
            cost += f"; {start.M * o.bins} passes were done before"
        if self.world.size > 1:
            cost += f"; shared by {self.world.size} processes"
        text = [f"given     {self.condition}"] if self.condition else []
        return [*text, cost, *([] if self.fisher is None else [str(self.fisher)])]

    @property
    def _repeated_groups(self) -> int:
        """How many groups of an existing map are measured again, for what the map lacks."""
        run = self.pending
        known = self.map or (None if run is None else run.start)
        if known is None:
            return 0
        if self.fisher is not None:
            return known.M - self.fisher.fisher.committed
        return 0 if run is None else max(0, known.M - run.known)

    def run(self, progress: Progress = silent) -> AnalysisResult:
        """Measure what is missing, save it, partition [0, T), and write the results.

        Raises:
            UsageError: if another process is working in OUT.
            NumericalError: if a gradient is not finite.
        """
        map, inputs = self.measure(progress), self.inputs
        reading = Reading(map, self.partition.score)
        summary = summarize(reading, self.partition.ranges, self.partition.method)
        words = ["--split", inputs.split] if inputs.split != "train" else []
        words += ["--skip-broken"] if inputs.skip_broken else []
        names = CommandNames(inputs.model, inputs.data, tuple(words))
        files = write_report(summary, self.out, names, is_stored=True)
        files += [] if self.fisher is None else self.fisher.paths
        return AnalysisResult(map, summary, self.out, files, self.measurement.options.target_se)

    def measure(self, progress: Progress = silent) -> ConflictMap:
        """Return the existing map, or measure and save it; finished groups are not measured again.

        Raises:
            UsageError: if another process is working in OUT.
            NumericalError: if a gradient is not finite.
        """
        with lock_folder(self.out / PARTIAL) if self.world.is_main else nullcontext():
            if self.world.is_main:
                self._check_no_new_map()
            measured = None if self.pending is None else self.pending.map(progress, self._tell)
            map = self.map or measured
            assert map is not None
            if self.world.is_main:
                self._save(map)
        return map

    def _tell(self, map: ConflictMap) -> None:
        line = self.early_note(map)
        if line is not None and self.tell is not None:
            self.tell(line)

    def early_note(self, map: ConflictMap) -> str | None:
        """Return a line if the first groups show that the map will say little, else None."""
        reading, o = Reading(map), self.measurement.options
        needed = sample_size(map, reading.bins, LEAST_KNOWN)
        if reading.blocks.is_enough or needed <= self.measurement.most_groups:
            return None
        seconds = None if self.pending is None else self.pending.seconds
        advice = "No affordable number of groups would resolve half of it."
        if needed < MOST:
            time = "" if seconds is None else f", {format_seconds(needed * o.bins * seconds)}"
            advice = f"About {needed:,} groups{time} would resolve half of it."
        state = " The joint gradient is not told from 0: the base has converged or was annealed."
        return (
            f"early     after {map.M} groups, gradients are resolved on"
            f" {reading.blocks.known:.0%} of [0, T).{state if reading.is_converged else ''}"
            f" {advice} Ctrl-C keeps the groups that are measured."
        )

    def _check_no_new_map(self) -> None:
        """Check that no other process finished a map since `plan` looked."""
        starts_anew = self.pending is not None and self.pending.start is None and not self.map
        if starts_anew and (self.out / MAP).exists():
            raise UsageError(
                f"another process has finished {self.out / MAP} meanwhile",
                fix="run the same command again",
            )

    def _save(self, map: ConflictMap) -> None:
        if map is not self.map:
            map.save(self.out / MAP)
        if self.fisher is not None and self.pending is not None:
            self.fisher.write(self.measurement.model.denoiser)
        self.checkpoint.remove()


def plan(
    inputs: AnalyzeInputs,
    options: MeasurementOptions | None = None,
    partition: PartitionOptions | None = None,
    *,
    tell: Callable[[str], None] | None = None,
) -> Plan:
    """Load what an analysis needs and check it, and time a few backward passes.

    A map in OUT of the same measurement is used as it is if it has as many groups as wanted, if
    their number is open, or if it reaches the target SE; it is extended if more are wanted. A
    Fisher is one of all groups of the map; if it exists of fewer, or not at all, all are measured
    for it.

    Raises:
        UsageError: if an option is wrong, or OUT holds parts of another measurement.
        InputError: if model, data or a map in OUT cannot be read.
        ResourceError: if the gradients do not fit the memory, or 5 groups do not fit the budget.
    """
    options, partition = options or MeasurementOptions(), partition or PartitionOptions()
    out = place_for(inputs.out)
    world, device = join(resolve_device(inputs.device))
    earlier = ConflictMap.load(out / MAP) if (out / MAP).exists() else None
    if earlier is not None and options.engine == "auto":
        options = replace(options, engine=earlier.origin.kept)
    base = Diffusion.load(inputs.model, device=device)
    if not (partition.ranges or 1) <= options.bins <= base.T:
        raise UsageError(
            f"{partition.ranges} ranges, {options.bins} bins and {base.T} timesteps do not fit",
            fix="give ranges <= bins <= timesteps",
        )
    images = base.load_images(inputs.data, split=inputs.split, skip_broken=inputs.skip_broken)
    condition = base.describe_condition(images)
    measurement = Measurement(base, images, options)
    checkpoint = MeasurementCheckpoint(out / PARTIAL, measurement.key())
    if earlier is not None:
        _check_same_measurement(earlier, out / MAP, checkpoint.key)
    _check_groups(earlier, out, options, world, device)
    map = earlier if earlier is not None and _suffices(earlier, measurement) else None
    start = earlier if map is None else None
    if map is not None and inputs.fisher is not None:
        fixed = replace(options, groups=map.M, budget=None, target_se=None)
        measurement = replace(measurement, options=fixed)
    fisher = None
    if inputs.fisher is not None:
        fisher = plan_fisher(measurement, inputs.fisher, out, world)
    run = None
    if map is None or not (fisher is None or fisher.exist()):
        checkpoint.check()
        sums = None if fisher is None else fisher.fisher
        run = begin(measurement, checkpoint, world=world, start=start, fisher=sums, timed=True)
        if map is not None:
            _check_fisher_budget(map, run.cost, options.budget)
    return Plan(
        replace(inputs, out=out),
        partition,
        measurement,
        checkpoint,
        map,
        run,
        fisher,
        world,
        condition,
        tell,
    )


def _check_groups(
    map: ConflictMap | None, out: Path, options: MeasurementOptions, world: World, device: str
) -> None:
    """Check that all processes see one map, and that it has no more groups than wanted."""
    groups = 0 if map is None else map.M
    if world.broadcast_number(groups, device) != groups:
        raise UsageError(
            f"{out / MAP} is not the same file for all processes",
            fix="give a folder that they share",
        )
    if not options.is_open and options.groups is not None and options.groups < groups:
        raise UsageError(
            f"{out / MAP} has more groups than wanted: groups was {groups}, now {options.groups}",
            fix=f"choose another folder, or leave out --groups to use the map with {groups}",
        )


def _check_same_measurement(map: ConflictMap, path: Path, key: Mapping[str, Any]) -> None:
    """Check that a map is of the measurement `key`."""
    own = {
        **asdict(map.origin),
        "bins": map.N,
        "layers": key["layers"] and map.layers is not None,
        "schedule": describe_schedule(map.log_snr),
        "antithetic": map.origin.noise,
    }
    differences = list_differences(own, key)
    if differences:
        raise UsageError(
            f"{path} was measured with other settings: {'; '.join(differences)}",
            fix="choose another folder",
        )


def _check_fisher_budget(map: ConflictMap, cost: MeasurementCost, budget: float | None) -> None:
    """Check that a Fisher of all groups of a map fits the budget."""
    if budget is not None and cost.seconds is not None and cost.seconds > budget:
        raise ResourceError(
            f"the Fisher of the map's {map.M} groups takes about {format_seconds(cost.seconds)},"
            f" and the budget is {format_seconds(budget)}",
            fix=f"give --budget {math.ceil(cost.seconds * 1.1)}s, or leave it out",
        )


def _suffices(map: ConflictMap, measurement: Measurement) -> bool:
    """Return whether a map of the same measurement has all that is wanted."""
    o = measurement.options
    if o.target_se is not None:
        return measurement.most_groups <= map.M or neighbour_se(map) <= o.target_se
    return o.budget is not None or o.groups is None or o.groups <= map.M
