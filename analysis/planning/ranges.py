"""Ranges from a stored map: how many it supports, where they lie, what they gain.

The map alone is needed: no model, no data, no accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demerge.analysis.partitioning.map_reading import Reading
from demerge.analysis.partitioning.options import RangesOptions
from demerge.analysis.report.summary import ADVISED, ConflictSummary, summarize
from demerge.conflict import ConflictMap
from demerge.diffusion.schedule import find_shift
from demerge.errors import InputError, UsageError
from demerge.progress import Progress, silent
from demerge.reporting.html import is_page
from demerge.stage import Cost
from demerge.storage.documents import check_replaceable
from demerge.storage.layout import read_pipeline_scheduler
from demerge.timesteps import Partition
from demerge.trainers import TrainerLines, write_for

PAGE = "conflict.html"


@dataclass(frozen=True, slots=True, eq=False)
class RangesPlan:
    """A map that is open, or a stored partition, and what is asked of it."""

    options: RangesOptions
    reading: Reading | None
    n: int | None = None  # the number of ranges; None is as many as groups support
    given: Partition | None = None  # ranges of your own

    def describe(self) -> list[str]:
        """Return what will be done, for a person."""
        if self.reading is None:
            return [f"ranges    {self.given}"]
        return [f"map       {self.reading.map!r}"]

    def cost(self) -> Cost:
        """Return what it will take."""
        return Cost()

    def run(self, progress: Progress = silent) -> RangesResult:
        """Read the map; write the ranges and the page if OUT is given."""
        o = self.options
        if self.reading is None:
            return RangesResult(None, None, _write_for(o, self.given))
        summary = summarize(
            self.reading, self.n, o.method or ADVISED, given=self.given, with_counts=True
        )
        if o.out is not None:
            from demerge.analysis.report.next_steps import CommandNames
            from demerge.analysis.report.page import write_page

            summary.partition.save(o.out)
            words = ("--split", o.split) if o.split != "train" else ()
            names = CommandNames(o.model or "MODEL", o.data or "DATA", words, o.map, o.out)
            write_page(summary, o.out.parent / PAGE, names)
        return RangesResult(summary, o.out, _write_for(o, summary.partition))


@dataclass(frozen=True, slots=True, eq=False)
class RangesResult:
    """What a map says, the file that holds its ranges, and their form for another trainer."""

    summary: ConflictSummary | None
    out: Path | None
    trainer: TrainerLines | None = None

    def lines(self) -> list[str]:
        """Return the result for a person."""
        lines = [] if self.summary is None else self.summary.lines()
        return lines if self.trainer is None else [*lines, *self.trainer.notes()]

    def answer(self) -> list[str]:
        """Return what a script takes: the ranges, or the lines of the trainer."""
        if self.trainer is not None:
            return self.trainer.lines()
        if self.out is not None or self.summary is None:
            return []
        return [" ".join(f"{span.start}:{span.stop}" for span in self.summary.partition)]

    def document(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        page = None if self.out is None else self.out.parent / PAGE
        document: dict[str, Any] = {"out": self.out, "page": page}
        if self.summary is not None:
            document |= self.summary.document()
        if self.trainer is not None:
            document["for"] = self.trainer.document()
        return document


def plan(options: RangesOptions) -> RangesPlan:
    """Open the map, or with `trainer` a stored partition, and check what is asked of it.

    Raises:
        InputError: if the map cannot be read, or was measured on other weights.
        UsageError: if the options do not fit the map, or OUT holds something else.
    """
    if options.trainer is not None and _holds_partition(options.map):
        _check_no_map_options(options)
        return RangesPlan(options, None, given=Partition.load(options.map))
    if options.trainer is None and options.map.suffix == ".json" and is_partition(options.map):
        what = f"{options.map} is a partition, not a conflict map"
        raise UsageError(what, fix="give --for TRAINER to write its ranges for one")
    map, minimum = load_map(options.map, options.model), options.minimum
    n, given = split_ranges(options.ranges, map.T)
    if options.cuts is not None:
        given = partition_at(options.cuts, map.T)
    if n is not None and n > map.N:
        fix = f"give --ranges {map.N} or fewer, or auto"
        raise UsageError(f"{n} ranges, and the map has {map.N} bins", fix=fix)
    parts = n or min(2, map.N)
    if minimum is not None and minimum > map.N // parts:
        what = f"minimum {minimum}: {parts} ranges of {minimum} bins or more do not fit the map's"
        raise UsageError(f"{what} {map.N} bins", fix=f"give 1 <= minimum <= {map.N // parts}")
    if options.out is not None:
        fix = "name another file, for example partition.json"
        check_replaceable(options.out, "a partition", is_partition, fix)
        page, fix = options.out.parent / PAGE, "name a file in another folder"
        check_replaceable(page, "a page of a conflict map", is_page, fix)
    return RangesPlan(options, Reading(map, options.score, options.minimum), n, given)


def split_ranges(ranges: int | str | None, total: int) -> tuple[int | None, Partition | None]:
    """Return what `--ranges` says: a number of ranges to be found, or ranges of [0, total)."""
    if isinstance(ranges, str):
        return None, Partition.parse(ranges, total, also="a number, auto")
    return ranges, None


def _write_for(options: RangesOptions, partition: Partition | None) -> TrainerLines | None:
    if options.trainer is None or partition is None:
        return None
    shift = options.shift
    if shift is None and (options.map / "model_index.json").is_file():
        shift = find_shift(read_pipeline_scheduler(options.map))
    return write_for(options.trainer, partition, shift)


def _holds_partition(path: Path) -> bool:
    return path.suffix == ".json" or (path / "model_index.json").is_file()


def _check_no_map_options(options: RangesOptions) -> None:
    """Refuse options of a map, for ranges that are there already."""
    names = ("ranges", "method", "cuts", "minimum", "model", "out")
    extra = [name for name in names if getattr(options, name) is not None]
    if extra:
        what = f"{options.map} is a partition already, and --{extra[0]} is for a conflict map"
        raise UsageError(what, fix=f"leave --{extra[0]} out, or name a map")


def partition_at(cuts: Sequence[int], total: int) -> Partition:
    """Return [0, total) cut at ascending timesteps."""
    if cuts[-1] >= total:
        fix = f"give timesteps between 0 and {total}, ascending"
        raise UsageError(f"cuts {list(cuts)} do not ascend within (0, {total})", fix=fix)
    return Partition.from_cuts(total, cuts)


def load_map(path: Path | str, model: str | None = None) -> ConflictMap:
    """Read a conflict.safetensors, or the one in a folder.

    Raises:
        InputError: if there is no map, or it was measured on another model than `model`, if that is
            given, or on another schedule.
    """
    path = Path(path)
    map = ConflictMap.load(path / "conflict.safetensors" if path.is_dir() else path)
    if model is None:
        return map
    from demerge.analysis.measurement.schedule import check_same_schedule
    from demerge.storage.checkpoint import Checkpoint
    from demerge.storage.hashing import remembered_content

    sha256 = remembered_content(Checkpoint.open(model))
    if sha256 != map.origin.model:
        measured = f"{path} was measured on a model of sha256 {map.origin.model[:16]}..."
        fix = "name the base that the map was measured on, or measure this one with analyze"
        raise InputError(f"{measured}, {model} has {sha256[:16]}...", fix=fix)
    check_same_schedule(map, path, model)
    return map


def is_partition(path: Path) -> bool:
    """Return whether a file holds a partition."""
    try:
        Partition.load(path)
    except InputError:
        return False
    return True
