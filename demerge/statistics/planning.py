"""The stage `demerge stats`: which statistics of which models and ranges are asked for, which are there, and the rest.

An expert gets its statistics beside its expert.json, where `demerge merge` finds them; with `out`, each range has a folder
OUT/0000-0250. What is there and agrees is left alone, so that the same call again does what is left to do.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.expert import EXPERT, find_expert_range
from demerge.statistics.examples import Collected
from demerge.statistics.fisher import range_fisher
from demerge.statistics.gram import layers_of, range_gram, width
from demerge.statistics.record import commit_measured, commit_stats, inputs_of, is_there
from demerge.storage.atomic import check_disk_space, place_for
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.hashing import remembered_content
from demerge.timesteps import Partition, TimestepRange

STATISTICS: Mapping[str, Callable[..., Collected]] = {"fisher": range_fisher, "gram": range_gram}
PROBE = 8
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One statistic of one model on one range, to be written into a folder."""

    model: str
    range: TimestepRange
    what: str
    folder: Path
    inputs: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file it ends in."""
        return self.folder / f"{self.what}.safetensors"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `stats` takes: `jobs` are to be done, `found` are there already; `first` is the first model."""

    first: Diffusion
    data: ImageData
    jobs: Sequence[Job]
    found: Sequence[Job]
    options: Mapping[str, Any]

    def run(self, progress: Progress) -> Iterator[Path]:
        """Measure what is not there yet; yield each file once it is written.

        Raises:
            NumericalError: where a gradient or a prediction is not finite, naming the sample.
            ResourceError: where the disk does not suffice.
        """
        samples, name, model = self.options["samples"], None, self.first
        for job in self.jobs:
            check_disk_space(job.path, self._bytes(job.what))
        for i, job in enumerate(self.jobs):
            if job.model != name:
                name, model = job.model, Diffusion.load(job.model, device=self.first.device)
            report = partial(
                _counted, progress, i * samples, len(self.jobs) * samples, f"{job.what} {job.range}"
            )
            collected = STATISTICS[job.what](
                model, self.data, job.range, **self.options, progress=report
            )
            commit_measured(job.folder, job.what, collected, job.inputs, self.options)
            yield job.path
        for folder in dict.fromkeys(job.folder for job in (*self.found, *self.jobs)):
            commit_stats(folder)

    def seconds(self) -> float:
        """Estimate, rather too high, what `run` takes, by a probe of a few samples of each statistic."""
        probe, seconds = min(PROBE, self.options["samples"]), 0.0
        for what, jobs in Counter(job.what for job in self.jobs).items():
            span, start = (
                next(job.range for job in self.jobs if job.what == what),
                time.perf_counter(),
            )
            STATISTICS[what](self.first, self.data, span, samples=probe, seed=self.options["seed"])
            seconds += (time.perf_counter() - start) * jobs * self.options["samples"] / probe
        return seconds

    def _bytes(self, what: str) -> int:
        """Return the bytes of a statistic in float32; its sums take twice as many of memory."""
        if what == "gram":
            return sum(4 * width(layer) ** 2 for layer in layers_of(self.first.denoiser).values())
        return 4 * self.first.parameters

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "files": [str(job.path) for job in self.jobs],
            "found": [str(job.path) for job in self.found],
            "options": dict(self.options),
            "images": len(self.data),
            "memory_bytes": max((2 * self._bytes(job.what) for job in self.jobs), default=0),
        }

    def lines(self) -> list[str]:
        """Return the plan and its cost for a person; the time comes from a probe."""
        models = list(dict.fromkeys(job.model for job in (*self.jobs, *self.found)))
        lines = [
            f"models  {' '.join(models)}: {self.first.parameters:,} parameters",
            f"data    {self.data.name}: {len(self.data):,} images {self.data.shape}",
            *(f"have    {job.path}" for job in self.found),
        ]
        if not self.jobs:
            return [*lines, "cost    nothing: all of it is there"]
        memory, samples = self.document()["memory_bytes"] / 1e6, self.options["samples"]
        cost = f"at most some {self.seconds():.0f} s, {memory:.0f} MB for sums"
        return [
            *lines,
            *(f"make    {job.path}" for job in self.jobs),
            f"cost    {len(self.jobs)} x {samples} samples: {cost}",
        ]


def prepare(
    models: Sequence[str],
    data: str,
    *,
    ranges: str | None = None,
    out: Path | str | None = None,
    what: Sequence[str] = tuple(STATISTICS),
    samples: int = 256,
    seed: int = 0,
    split: str = "train",
    skip_broken: bool = False,
    device: str = "cpu",
) -> Plan:
    """Load what the statistics need, and find out which are there.

    Args:
        models: experts, or other models of one architecture.
        ranges: uniform:N, joint, a partition.json or START:STOP; an expert's own where none is given.
        out: where the folders of the ranges go; beside each expert.json where none is given.
        what: names of `STATISTICS`.

    Raises:
        UsageError: where a word is wrong, or a statistic is there that was made otherwise.
        InputError: where a model or the data cannot be read.
    """
    out = None if out is None else place_for(out)
    for name in what:
        if name not in STATISTICS:
            raise UsageError(f"statistic '{name}' is unknown", fix=f"use {' or '.join(STATISTICS)}")
    first = Diffusion.load(models[0], device=device)
    images = first.load_images(data, split=split, skip_broken=skip_broken)
    options = {"samples": samples, "seed": seed}
    jobs = [
        job
        for model in models
        for job in _jobs(model, images, first.T, ranges, out, list(dict.fromkeys(what)))
    ]
    for path, times in Counter(job.path for job in jobs).items():
        if times > 1:
            raise UsageError(
                f"{times} models have {path} for their output",
                fix="name each once, or leave out -o",
            )
    there = [is_there(job.folder, job.what, job.inputs, options) for job in jobs]
    todo, found = (
        [job for job, is_done in zip(jobs, there, strict=True) if is_done is done]
        for done in (False, True)
    )
    return Plan(first, images, todo, found, options)


def _jobs(
    model: str, data: ImageData, T: int, ranges: str | None, out: Path | None, what: Sequence[str]
) -> Iterator[Job]:
    checkpoint = Checkpoint.open(model)
    sha256 = remembered_content(checkpoint)
    for span, folder in _folders(model, checkpoint, T, ranges, out):
        for name in what:
            yield Job(model, span, name, folder, inputs_of(sha256, data, span))


def _folders(
    model: str, checkpoint: Checkpoint, T: int, ranges: str | None, out: Path | None
) -> list[tuple[TimestepRange, Path]]:
    """Return the ranges that are asked for and where their statistics go."""
    record, own = checkpoint.place.beside(EXPERT), find_expert_range(checkpoint.place)
    if ranges is None and own is None:
        raise UsageError(
            f"{model} is not an expert with a range of its own",
            fix="give --ranges, for example uniform:4",
        )
    spans = _spans(ranges, T) if ranges is not None else [own] if own else []
    if out is not None:
        return [(span, out / str(span)) for span in spans]
    if record is None or len(spans) > 1:
        what = (
            f"{model} is not an expert"
            if record is None
            else f"{len(spans)} ranges do not fit beside one expert"
        )
        raise UsageError(f"no output is named and {what}", fix="give -o DIR")
    return [(spans[0], record.parent)]


def _spans(text: str, T: int) -> Sequence[TimestepRange]:
    if text[:1].isdigit() and not Path(text).exists():
        return [TimestepRange.parse(text)]
    return Partition.parse(text, T, besides="START:STOP").ranges


def _counted(progress: Progress, before: int, total: int, text: str, done: int, _: int) -> None:
    progress(before + done, total, text)
