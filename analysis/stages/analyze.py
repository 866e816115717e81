"""What an analysis is about to do: model, data and settings checked, cost known, an earlier map of the same origin found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from demerge.analysis.measurement.budget import neighbour_se, said
from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.collector import Progress
from demerge.analysis.measurement.fisher import FisherFiles, fisher_files
from demerge.analysis.measurement.gradients import Cost, Measurement
from demerge.analysis.measurement.lock import alone_in
from demerge.analysis.measurement.options import MEMORY, Settings, duration, groups_of
from demerge.analysis.measurement.parallel import ALONE, World, join
from demerge.analysis.measurement.run import Run
from demerge.analysis.measurement.schedule import described
from demerge.analysis.partitioning.bootstrap import Evidence
from demerge.analysis.partitioning.objective import METHODS, SCORES
from demerge.analysis.partitioning.resolution import LEAST_KNOWN
from demerge.analysis.partitioning.sample_size import MOST, groups_needed
from demerge.analysis.report.verdict import converged
from demerge.conflict import ConflictMap
from demerge.diffusion.model import Diffusion
from demerge.errors import ResourceError, UsageError
from demerge.storage.atomic import place_for

MAP, PARTIAL = "conflict.safetensors", "conflict.partial"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything one analysis takes; the map's place is OUT/conflict.safetensors, its finished groups' OUT/conflict.partial.

    Attributes:
        found: the map that is there already and is the one that was asked for.
        run: what is to be measured where there is none, or more groups than it has, or a Fisher.
        fisher: the Fisher that is asked for; it is there where there is no run.
        world: the processes that share the work; the first one writes.
    """

    measurement: Measurement
    out: Path
    partial: MeasurementCheckpoint
    found: ConflictMap | None
    run: Run | None
    fisher: FisherFiles | None = None
    world: World = ALONE

    @property
    def cost(self) -> Cost:
        """What is left to be done."""
        return self.measurement.cost() if self.run is None else self.run.cost

    def __str__(self) -> str:
        if self.run is None:
            there = (
                ""
                if self.found is None
                else f", with {self.found.M} groups; --groups N adds to them"
            )
            return f"cost      nothing: the map of this measurement is there already{there}"
        s, start = self.measurement.settings, self.run.start
        told = self.measurement.model.describe_condition(self.measurement.data)
        cost = (
            f"given     {told}\n" if told else ""
        ) + f"cost      {self.cost}; batches of {s.batch_size}"
        if self._again > 0:
            why = (
                "their exact gradients are not kept"
                if self.fisher is None
                else "no sums for the Fisher are kept"
            )
            cost += f"; {self._again} groups of the map are measured again, as {why}"
        elif start is not None:
            cost += f"; {start.M * s.bins} passes were done before"
        if self.world.size > 1:
            cost += f"; shared by {self.world.size} processes"
        return cost if self.fisher is None else f"{cost}\n{self.fisher}"

    @property
    def _again(self) -> int:
        """How many groups of a map that is there are measured again, as it does not hold what more groups or a Fisher take."""
        there = self.found or (None if self.run is None else self.run.start)
        if there is None:
            return 0
        if self.fisher is not None:
            return there.M - self.fisher.fisher.committed
        return 0 if self.run is None else max(0, there.M - self.run.known)

    def map(
        self, progress: Progress | None = None, tell: Callable[[str], None] | None = None
    ) -> ConflictMap:
        """Return the map that is there, or measure and save it; groups that an earlier call finished are not measured again.

        Args:
            progress: called after each cell.
            tell: called with a line after 5 groups, if the map will say little.

        Raises:
            UsageError: where another process is at work in OUT.
            NumericalError: where a gradient is not finite.
        """
        with alone_in(self.out / PARTIAL) if self.world.main else nullcontext():
            if self.world.main:
                self._check_no_new_map()
            early = None if tell is None else lambda map: [tell(line) for line in self.early(map)]
            measured = None if self.run is None else self.run.map(progress, early)  # type: ignore[arg-type]
            map = cast("ConflictMap", self.found or measured)
            if self.world.main:
                self._keep(map)
        return map

    def early(self, map: ConflictMap) -> list[str]:
        """Return what the first groups say of a base whose map will say little, and the budget that would do."""
        evidence, s = Evidence.of(map), self.measurement.settings
        needed = groups_needed(map, evidence.found, LEAST_KNOWN)
        if evidence.blocks.known >= LEAST_KNOWN or needed <= self.measurement.most:
            return []
        seconds = None if self.run is None else self.run.seconds
        cost = "" if seconds is None else f", about {duration(needed * s.bins * seconds)}"
        would = (
            "no affordable number would do" if needed >= MOST else f"some {needed:,} would do{cost}"
        )
        why = (
            "; the joint gradient is not told from 0, as at a base that has converged or was annealed"
            if converged(evidence)
            else ""
        )
        known = (
            f"after {map.M} groups gradients are resolved on {evidence.blocks.known:.0%} of [0, T)"
        )
        return [
            f"early     {known}{why}. For half of it {would}. Ctrl-C keeps the groups that are measured."
        ]

    def _check_no_new_map(self) -> None:
        """Refuse to replace a map that another process finished since `prepare` looked."""
        started = self.run is not None and self.run.start is None and self.found is None
        if started and (self.out / MAP).exists():
            raise UsageError(
                f"another process has finished {self.out / MAP} meanwhile",
                fix="run the same command again",
            )

    def _keep(self, map: ConflictMap) -> None:
        if map is not self.found:
            map.save(self.out / MAP)
        if self.fisher is not None and self.run is not None:
            self.fisher.write(self.measurement.model.denoiser)
        self.partial.sweep()

    @property
    def files(self) -> list[Path]:
        """The files of the Fisher, where it is asked for."""
        return [] if self.fisher is None else self.fisher.paths

    def lines(self, map: ConflictMap) -> list[str]:
        """Return whether the map is as sure as was asked."""
        target = self.measurement.settings.se
        return [] if target is None else [f"{'se':12}  {said(map, target)}"]


def prepare(
    model: str,
    data: str,
    out: Path | str,
    *,
    bins: int = 20,
    groups: int | None = None,
    batch_size: int = 16,
    draws: str = "shared",
    antithetic: str | bool = "off",
    metric: str = "euclid",
    engine: str = "auto",
    params: str = "all",
    layers: bool = False,
    seed: int = 0,
    split: str = "train",
    skip_broken: bool = False,
    memory: int = MEMORY,
    budget: float | None = None,
    se: float | None = None,
    precision: str = "no",
    ranges: int = 4,
    method: str = "gradient",
    score: str = "step",
    fisher: str | None = None,
    device: str = "cpu",
) -> Plan:
    """Load what an analysis needs and check it, and time a few backward passes where there is something to measure.

    A map in OUT of the same measurement is taken as it is where it has as many groups as were asked for, where their number
    was left open (None, or found by a budget), or where it has the SE; it is extended where more are asked for. A Fisher is
    one of all groups of the map; where it is there of fewer, or not at all, all groups are measured for it.

    Raises:
        UsageError: where an argument is wrong, or OUT holds the map or finished groups of another measurement.
        InputError: where model, data or a map in OUT cannot be read.
        ResourceError: where the gradients do not fit the memory, or 5 groups do not fit the budget.
    """
    out = place_for(out)
    for name, value, known in (("method", method, METHODS), ("score", score, SCORES)):
        if value not in known:
            raise UsageError(f"{name} '{value}' is unknown", fix=f"use one of {', '.join(known)}")
    world, device = join(device)
    there = ConflictMap.load(out / MAP) if (out / MAP).exists() else None
    settings = Settings(
        bins=bins,
        groups=groups_of(groups, open=budget is not None or se is not None),
        batch_size=batch_size,
        seed=seed,
        draws=draws,
        antithetic=antithetic,
        metric=metric,
        engine=there.origin.kept if there is not None and engine == "auto" else engine,
        params=params,
        layers=layers,
        memory=memory,
        budget=budget,
        se=se,
        precision=precision,
    )
    base = Diffusion.load(model, device=device)
    if not 1 <= ranges <= bins <= base.T:
        raise UsageError(
            f"{ranges} ranges, {bins} bins and {base.T} timesteps do not fit",
            fix="give ranges <= bins <= timesteps",
        )
    images = base.load_images(data, split=split, skip_broken=skip_broken)
    base.describe_condition(images)
    measurement = Measurement(base, images, settings)
    partial = MeasurementCheckpoint(out / PARTIAL, measurement.key())
    found = None if there is None else _earlier(there, out / MAP, partial.key)
    groups_there = 0 if found is None else found.M
    if world.agree(groups_there, device) != groups_there:
        raise UsageError(
            f"{out / MAP} is not the same file for all processes",
            fix="give a folder that they share",
        )
    if found is not None and groups is not None and groups < found.M and not settings.open:
        raise UsageError(
            f"{out / MAP} is of another measurement: groups {found.M} there, {groups} asked",
            fix=f"choose another folder, or leave out --groups to take the map with {found.M}",
        )
    start = None if found is None or _suffices(found, measurement, groups) else found
    found = None if start is not None else found
    if found is not None and fisher is not None:
        measurement = replace(
            measurement, settings=replace(settings, groups=found.M, budget=None, se=None)
        )
    squares = None if fisher is None else fisher_files(measurement, fisher, out, world)
    if found is not None and (squares is None or squares.are_there()):
        return Plan(measurement, out, partial, found, None, squares, world)
    partial.check()
    of = None if squares is None else squares.fisher
    run = measurement.begin(partial, world=world, start=start, fisher=of, timed=True)
    if found is not None and budget is not None:
        _check_fisher_budget(found, run.cost, budget)
    return Plan(measurement, out, partial, found, run, squares, world)


def _check_fisher_budget(found: ConflictMap, cost: Cost, budget: float) -> None:
    """Refuse a Fisher of all groups of a map that does not fit the budget."""
    if cost.seconds is not None and cost.seconds > budget:
        raise ResourceError(
            f"the Fisher of the map's {found.M} groups takes about {duration(cost.seconds)},"
            f" and the budget is {duration(budget)}",
            fix=f"give --budget {math.ceil(cost.seconds * 1.1)}s, or leave it out",
        )


def _suffices(found: ConflictMap, measurement: Measurement, asked: int | None) -> bool:
    """Return whether a map of the same measurement is all that is asked for."""
    s = measurement.settings
    if s.se is not None:
        return measurement.most <= found.M or neighbour_se(found) <= s.se
    return s.budget is not None or asked is None or asked <= found.M


def _earlier(map: ConflictMap, path: Path, asked: Mapping[str, Any]) -> ConflictMap:
    """Return the map at `path`; refuse one of another measurement."""
    there = {
        **asdict(map.origin),
        "bins": map.N,
        "layers": asked["layers"] and map.layers is not None,
        "schedule": described(map.log_snr),
        "antithetic": map.origin.noise,
    }
    differences = [
        f"{name} {there[name]} there, {asked[name]} asked"
        for name in asked
        if there[name] != asked[name]
    ]
    if differences:
        raise UsageError(
            f"{path} is of another measurement: {'; '.join(differences)}",
            fix="choose another folder",
        )
    return map
