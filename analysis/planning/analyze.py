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
from demerge.analysis.measurement.gradients import Measurement, MeasurementCost, describe_bins
from demerge.analysis.measurement.options import AnalyzeInputs, MeasurementOptions
from demerge.analysis.measurement.run import Run, begin
from demerge.analysis.measurement.schedule import describe_schedule
from demerge.analysis.partitioning.map_reading import Reading
from demerge.analysis.partitioning.options import PartitionOptions
from demerge.analysis.partitioning.resolution import LEAST_KNOWN, MOST_GROUPS, sample_size
from demerge.analysis.planning.ranges import split_ranges
from demerge.analysis.report.next_steps import CommandNames
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
from demerge.timesteps import Partition

MAP, PARTIAL = "conflict.safetensors", "conflict.partial"


@dataclass(frozen=True, slots=True)
class AnalysisResult:
    """What an analysis found, and the files it wrote."""

    map: ConflictMap
    summary: ConflictSummary
    out: Path
    files: list[Path]
    target_se: float | None = None  # the SE that was wanted, if any

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
    """Everything one analysis needs."""

    inputs: AnalyzeInputs
    partition: PartitionOptions
    measurement: Measurement
    checkpoint: MeasurementCheckpoint  # OUT/conflict.partial, the finished groups
    map: ConflictMap | None  # the map in OUT, if it has all that is wanted
    pending: Run | None  # a map, more groups for it, or a Fisher; None for nothing
    fisher: FisherFiles | None = None  # its files exist if nothing is pending
    world: World = ALONE  # the processes that share the work; the first one writes
    n: int | None = None  # the number of ranges; None is as many as groups support
    given: Partition | None = None  # ranges of your own
    condition: str | None = None  # what the denoiser gets besides the images
    tell: Callable[[str], None] | None = None  # called with a line if the map will say little

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
        run, o = self.pending, self.measurement.options
        if run is None:
            groups = f", with {self.map.M} groups; --groups N adds to them" if self.map else ""
            return [f"cost      nothing: the map of this measurement exists already{groups}"]
        cost = f"cost      {run.cost}; batches of {o.batch_size}"
        existing = self.map or run.start
        missing, measured = "exact gradients", run.known
        if self.fisher is not None:
            missing, measured = "the sums of the Fisher", self.fisher.fisher.committed
        if existing is not None and measured < existing.M:
            cost += f"; {existing.M - measured} groups of the map are measured again,"
            cost += f" as it lacks {missing}"
        elif run.start is not None:
            cost += f"; {run.start.M * o.bins} passes were done before"
        if self.world.size > 1:
            cost += f"; shared by {self.world.size} processes"
        text = [f"input     {self.condition}"] if self.condition else []
        return [*text, cost, *([] if self.fisher is None else [str(self.fisher)])]

    def run(self, progress: Progress = silent) -> AnalysisResult:
        """Measure what is missing, save it, partition [0, T), and write the results."""
        from demerge.analysis.report.page import write_report  # with seaborn

        map, inputs, partition = self.measure(progress), self.inputs, self.partition
        reading = Reading(map, partition.score)
        summary = summarize(reading, self.n, partition.method, given=self.given)
        words = ["--split", inputs.split] if inputs.split != "train" else []
        words += ["--skip-broken"] if inputs.skip_broken else []
        names = CommandNames(inputs.model, inputs.data, tuple(words))
        files = write_report(summary, inputs.out, names, is_stored=True)
        files += [] if self.fisher is None else self.fisher.paths
        return AnalysisResult(map, summary, inputs.out, files, self.measurement.options.target_se)

    def measure(self, progress: Progress = silent) -> ConflictMap:
        """Return the existing map, or measure what is missing of it and save it."""
        folder, run, is_main = self.inputs.out, self.pending, self.world.is_main
        with lock_folder(folder / PARTIAL) if is_main else nullcontext():
            is_first = run is not None and run.start is None and self.map is None
            if is_main and is_first and (folder / MAP).exists():
                what = f"another process has finished {folder / MAP} meanwhile"
                raise UsageError(what, fix="run the same command again")
            measured = None if run is None else run.map(progress, self._note)
            map = self.map or measured
            assert map is not None
            if is_main:
                if self.map is None:
                    map.save(folder / MAP)
                if self.fisher is not None and run is not None:
                    self.fisher.write(self.measurement.model.denoiser)
                self.checkpoint.remove()
        return map

    def _note(self, map: ConflictMap) -> None:
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
        known = f"gradients stand out from noise on {reading.blocks.known:.0%} of the timesteps."
        if reading.is_converged:
            known += " Noise hides the joint gradient too: the base has converged or was annealed."
        advice = "No affordable number of groups would resolve half of it."
        if needed < MOST_GROUPS:
            time = "" if seconds is None else f", {format_seconds(needed * o.bins * seconds)}"
            advice = f"About {needed:,} groups{time} would resolve half of it."
        stop = "Ctrl-C stops; groups that are measured stay."
        return f"early     after {map.M} groups, {known} {advice} {stop}"


def plan(
    inputs: AnalyzeInputs,
    options: MeasurementOptions | None = None,
    partition: PartitionOptions | None = None,
    *,
    tell: Callable[[str], None] | None = None,
) -> Plan:
    """Load what an analysis needs and check it, and time a few backward passes.

    A map in OUT of the same measurement is used as it is if it has as many groups as wanted, if
    their number is open, or if it reaches the target SE; otherwise it is extended. A Fisher needs
    all groups of the map: if its files lack some, all are measured for it.

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
    base = Diffusion.load(inputs.model, device=device, resolution=inputs.resolution, pairs=False)
    n, given = split_ranges(partition.ranges, base.T)
    count = len(given) if given else n or 1
    if not count <= options.bins <= base.T:
        what = f"{count} ranges, {options.bins} bins and {base.T} timesteps do not fit"
        raise UsageError(what, fix="give ranges <= bins <= timesteps")
    bins = given
    if earlier is not None and (options.bins, base.T) == (earlier.N, earlier.T):
        bins = earlier.bins
        _check_edges(earlier, out / MAP, given)
    images = base.load_images(inputs.data, split=inputs.split, skip_broken=inputs.skip_broken)
    condition = base.describe_condition(images)
    measurement = Measurement(base, images, options, ranges=bins)
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
        seconds, budget = run.cost.seconds, options.budget
        if map is not None and budget is not None and seconds is not None and seconds > budget:
            raise ResourceError(
                f"the Fisher of the map's {map.M} groups takes about {format_seconds(seconds)},"
                f" and the budget is {format_seconds(budget)}",
                fix=f"give --budget {math.ceil(seconds * 1.1)}s, or leave it out",
            )
    inputs = replace(inputs, out=out)
    work = (measurement, checkpoint, map, run, fisher, world)
    return Plan(inputs, partition, *work, n, given, condition, tell)


def _check_groups(
    map: ConflictMap | None, out: Path, options: MeasurementOptions, world: World, device: str
) -> None:
    """Check that all processes see one map, and that it has no more groups than wanted."""
    groups = 0 if map is None else map.M
    if world.broadcast_number(groups, device) != groups:
        what = f"{out / MAP} is not the same file for all processes"
        raise UsageError(what, fix="give a folder that they share")
    if not options.is_open and options.groups is not None and options.groups < groups:
        what = f"{out / MAP} has more groups than wanted: groups was {groups}, now {options.groups}"
        fix = f"choose another folder, or leave out --groups to use the map with {groups}"
        raise UsageError(what, fix=fix)


def _check_edges(map: ConflictMap, path: Path, given: Partition | None) -> None:
    """Check that no boundary of ranges lies inside of a bin of an existing map."""
    inside = sorted(set(given.cuts) - set(map.bins.cuts)) if given else []
    if inside:
        places = ", ".join(str(cut) for cut in inside)
        what = f"{path} has bins that are not cut at {places}"
        fix = "choose another folder: a new map has bins that are cut there"
        raise UsageError(what, fix=fix)


def _check_same_measurement(map: ConflictMap, path: Path, key: Mapping[str, Any]) -> None:
    """Check that a map is of the measurement `key`."""
    own = {**asdict(map.origin), "bins": describe_bins(map.bins), "antithetic": map.origin.noise}
    own["layers"] = key["layers"] and map.layers is not None
    own["schedule"] = describe_schedule(map.log_snr)
    differences = list_differences(own, key)
    if differences:
        what = f"{path} was measured with other settings: {'; '.join(differences)}"
        raise UsageError(what, fix="choose another folder")


def _suffices(map: ConflictMap, measurement: Measurement) -> bool:
    """Return whether a map of the same measurement has all that is wanted."""
    o = measurement.options
    if o.target_se is not None:
        return measurement.most_groups <= map.M or neighbour_se(map) <= o.target_se
    return o.budget is not None or o.groups is None or o.groups <= map.M
