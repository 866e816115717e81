"""The stage `demerge stats`: which statistics of which models and ranges are still to be measured.

An expert gets its statistics next to its expert.json, where `demerge merge` finds them. With `out`,
each range has a folder OUT/0000-0250. A file that exists and agrees is left alone: the same call
again does only what is left to do.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demerge.data import ImageData
from demerge.device import resolve_device
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.expert import EXPERT, find_expert_range
from demerge.progress import Progress, silent
from demerge.stage import Cost
from demerge.statistics.examples import Collected
from demerge.statistics.fisher import range_fisher
from demerge.statistics.gram import gram_layers, input_width, range_gram
from demerge.statistics.options import StatisticsOptions
from demerge.statistics.record import commit_measured, commit_stats, has_statistic, inputs_of
from demerge.storage.atomic import check_disk_space, place_for
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.hashing import remembered_content
from demerge.timesteps import Partition, TimestepRange

MEASURE: Mapping[str, Callable[..., Collected]] = {"fisher": range_fisher, "gram": range_gram}
PROBE = 8  # samples that the estimate of the time is measured on


@dataclass(frozen=True, slots=True)
class Job:
    """One statistic of one model on one range, to be written into a folder."""

    model: str
    range: TimestepRange
    statistic: str
    folder: Path
    inputs: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self.folder / f"{self.statistic}.safetensors"


@dataclass(frozen=True, slots=True)
class StatisticsResult:
    """Which files were written, and which existed."""

    plan: StatisticsPlan

    def lines(self) -> list[str]:
        """Return the result for a person."""
        return [f"wrote   {job.path}" for job in self.plan.jobs]

    def document(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        plan = self.plan
        return {
            "files": [str(job.path) for job in plan.jobs],
            "found": [str(job.path) for job in plan.finished],
            "options": plan.options.recorded,
            "images": len(plan.data),
            "memory_bytes": plan.cost().memory,
        }


@dataclass(frozen=True, slots=True)
class StatisticsPlan:
    """What is to be measured, what is finished, and the time; the first model is loaded."""

    options: StatisticsOptions
    model: Diffusion
    data: ImageData
    jobs: Sequence[Job]
    finished: Sequence[Job]
    seconds: float

    def describe(self) -> list[str]:
        """Return the models, the data, the files and the cost."""
        models = dict.fromkeys(job.model for job in (*self.jobs, *self.finished))
        lines = [
            f"models  {' '.join(models)}: {self.model.parameters:,} parameters",
            f"data    {self.data.name}: {len(self.data):,} images {self.data.shape}",
            *(f"have    {job.path}" for job in self.finished),
        ]
        if not self.jobs:
            return [*lines, "cost    nothing: all files exist"]
        megabytes = (self.cost().memory or 0) / 1e6
        return [
            *lines,
            *(f"make    {job.path}" for job in self.jobs),
            f"cost    {len(self.jobs)} x {self.options.samples} samples: at most some"
            f" {self.seconds:.0f} s, {megabytes:.0f} MB of sums",
        ]

    def cost(self) -> Cost:
        """Return samples, estimated time, bytes of the largest sums, and bytes of the files."""
        sizes = [_bytes(self.model, job.statistic) for job in self.jobs]
        steps, memory = len(self.jobs) * self.options.samples, 2 * max(sizes, default=0)
        return Cost(steps=steps, seconds=self.seconds, memory=memory, disk=sum(sizes))

    def run(self, progress: Progress = silent) -> StatisticsResult:
        """Measure and write what does not exist yet.

        Raises:
            NumericalError: if a gradient or a prediction is not finite, naming the sample.
            ResourceError: if the disk is too small.
        """
        model, name, steps = self.model, None, self.cost().steps
        options = self.options.recorded
        for job in self.jobs:
            check_disk_space(job.path, _bytes(model, job.statistic))
        for i, job in enumerate(self.jobs):
            if job.model != name:
                name, model = job.model, _load(job.model, self.options)

            def report(done: int, total: int, text: str = "", i: int = i, job: Job = job) -> None:
                progress(i * total + done, steps, f"{job.statistic} {job.range}")

            measure = MEASURE[job.statistic]
            collected = measure(model, self.data, job.range, **options, progress=report)
            commit_measured(job.folder, job.statistic, collected, job.inputs, options)
        for folder in dict.fromkeys(job.folder for job in (*self.finished, *self.jobs)):
            commit_stats(folder)
        return StatisticsResult(self)


def _load(model: str, options: StatisticsOptions) -> Diffusion:
    device = resolve_device(options.device)
    return Diffusion.load(model, device=device, resolution=options.resolution, pairs=False)


def plan(options: StatisticsOptions) -> StatisticsPlan:
    """Load what the statistics need, and find out which exist.

    Raises:
        UsageError: if an option is wrong, or a statistic was made with other options.
        InputError: if a model or the data cannot be read.
    """
    out = None if options.out is None else place_for(options.out)
    first = _load(options.models[0], options)
    images = first.load_images(options.data, split=options.split, skip_broken=options.skip_broken)
    jobs: list[Job] = []
    for model in options.models:
        jobs += _jobs(model, images, first.T, out, options)
    for path, times in Counter(job.path for job in jobs).items():
        if times > 1:
            fix = "name each model once, or leave out -o"
            raise UsageError(f"{times} models have {path} for their output", fix=fix)
    todo: list[Job] = []
    finished: list[Job] = []
    for job in jobs:
        exists = has_statistic(job.folder, job.statistic, job.inputs, options.recorded)
        (finished if exists else todo).append(job)
    seconds = _seconds(first, images, todo, options)
    return StatisticsPlan(options, first, images, todo, finished, seconds)


def _seconds(
    model: Diffusion, data: ImageData, jobs: Sequence[Job], options: StatisticsOptions
) -> float:
    """Estimate the time of all jobs by measuring a few samples of each statistic."""
    probe, seconds = min(PROBE, options.samples), 0.0
    for job in {job.statistic: job for job in reversed(jobs)}.values():
        start = time.perf_counter()
        MEASURE[job.statistic](model, data, job.range, samples=probe, seed=options.seed)
        count = sum(job.statistic == other.statistic for other in jobs)
        seconds += (time.perf_counter() - start) * count * options.samples / probe
    return seconds


def _bytes(model: Diffusion, statistic: str) -> int:
    """Return the bytes of a statistic in float32; its sums take twice as many of memory."""
    if statistic == "gram":
        return sum(4 * input_width(layer) ** 2 for layer in gram_layers(model.denoiser).values())
    return 4 * model.parameters


def _jobs(
    model: str, data: ImageData, T: int, out: Path | None, options: StatisticsOptions
) -> Iterator[Job]:
    """Yield a job for each range and statistic of a model."""
    checkpoint = Checkpoint.open(model)
    sha256, own = remembered_content(checkpoint), find_expert_range(checkpoint.place)
    record = checkpoint.place.find_file(EXPERT)
    if options.ranges is not None:
        spans = _parse_ranges(options.ranges, T)
    elif own is not None:
        spans = [own]
    else:
        fix = "give --ranges, for example uniform:4"
        raise UsageError(f"{model} has no expert.json that names its range of timesteps", fix=fix)
    if out is None and record is None:
        raise UsageError(f"no output is named and {model} is not an expert", fix="give -o DIR")
    if out is None and len(spans) > 1:
        what = f"no output is named and {len(spans)} ranges do not fit next to one expert"
        raise UsageError(what, fix="give -o DIR")
    for span in spans:
        folder = Path() if record is None else record.parent
        if out is not None:
            folder = out / str(span)
        for name in options.statistics:
            yield Job(model, span, name, folder, inputs_of(sha256, data, span))


def _parse_ranges(text: str, T: int) -> Sequence[TimestepRange]:
    if text[:1].isdigit() and "," not in text and not Path(text).exists():
        return [TimestepRange.parse(text)]
    return Partition.parse(text, T, also="START:STOP").ranges
