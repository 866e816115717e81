"""Ranges of training timesteps, and the partition that routes a timestep to its range.

A range is half-open, [start, stop), on *training* timesteps; 0 has the least noise. A partition
covers [0, T) by contiguous ranges without gap or overlap. Routing is by the value of t, never by
the index of an inference step. So it is right for any number of inference steps and for float
timesteps (DeMe, arXiv 2410.06664, section 3).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from demerge.errors import InputError, UsageError
from demerge.storage.atomic import commit_json
from demerge.storage.layout import SECOND, read_index, read_pipeline_scheduler
from demerge.storage.schema import Record, Span, read_record

SHOWN = 12  # inner boundaries up to which a repr lists all
FIX = 'write {"ranges": [[0, 250], [250, 1000]]}'
STEPS = 1000  # diffusers' default of num_train_timesteps


@dataclass(frozen=True, slots=True, order=True)
class TimestepRange:
    """The training timesteps [start, stop); its text is `0000-0250`.

    Raises:
        UsageError: unless 0 <= start < stop.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            what = f"timestep range [{self.start}, {self.stop}) is empty or negative"
            raise UsageError(what, fix="give 0 <= start < stop, for example 0:250")

    @classmethod
    def parse(cls, text: str) -> TimestepRange:
        """Read `0:250` or `0000-0250`."""
        match = re.fullmatch(r"\s*(\d+)\s*[:-]\s*(\d+)\s*", text)
        if match is None:
            fix = "write start:stop, for example 0:250"
            raise UsageError(f"'{text}' is not a timestep range", fix=fix)
        return cls(int(match[1]), int(match[2]))

    def __repr__(self) -> str:
        return f"TimestepRange({self.start}, {self.stop})"

    def __str__(self) -> str:
        return f"{self.start:04d}-{self.stop:04d}"

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, t: float) -> bool:
        return self.start <= t < self.stop


class PartitionRecord(Record):
    """A partition.json."""

    format: Literal["demerge.partition/1"] = "demerge.partition/1"
    ranges: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Partition:
    """Contiguous ranges that cover [0, T), in the order of t.

    Raises:
        UsageError: if the ranges leave a gap, overlap, or do not begin at 0.
    """

    ranges: tuple[TimestepRange, ...]

    def __post_init__(self) -> None:
        if not self.ranges:
            raise UsageError("a partition needs at least one range", fix="for example uniform:4")
        if self.ranges[0].start != 0:
            what = f"the first range {self.ranges[0]} does not begin at 0"
            raise UsageError(what, fix="cover [0, T) from 0 on")
        for left, right in pairwise(self.ranges):
            if left.stop != right.start:
                what = f"ranges {left} and {right} leave a gap or overlap"
                raise UsageError(what, fix="let each range begin at the stop of the one before")

    @classmethod
    def from_cuts(cls, total: int, cuts: Sequence[int]) -> Partition:
        """Cut [0, total) at the inner timesteps `cuts`, ascending."""
        edges = [0, *cuts, total]
        return cls(tuple(TimestepRange(a, b) for a, b in pairwise(edges)))

    @classmethod
    def uniform(cls, total: int, n: int) -> Partition:
        """Cut [0, total) into n ranges of equal width, up to rounding."""
        if not 1 <= n <= total:
            what = f"cannot cut {total} timesteps into {n} ranges"
            raise UsageError(what, fix=f"give 1 <= n <= {total}")
        return cls.from_cuts(total, [round(i * total / n) for i in range(1, n)])

    @classmethod
    def from_boundary(cls, boundary: float, total: int) -> Partition:
        """Cut [0, total) in two as diffusers' WanPipeline does: t >= boundary total is high noise.

        Raises:
            UsageError: if one of the two would have no timestep.
        """
        cut = math.ceil(boundary * total)
        if not 0 < cut < total:
            what = f"boundary {boundary} leaves a denoiser without timesteps"
            raise UsageError(what, fix="give a number between 0 and 1")
        return cls.from_cuts(total, [cut])

    @classmethod
    def of_pipeline(cls, folder: Path) -> Partition | None:
        """Read the two ranges, low noise first, of a pipeline of two denoisers; None if it has one.

        `transformer` has the timesteps t >= b T, `transformer_2` the others, with b the
        `boundary_ratio` of model_index.json and T the scheduler's `num_train_timesteps`.

        Raises:
            InputError: if b is missing or not in (0, 1), or T is not a number of timesteps.
        """
        if not (folder / "model_index.json").is_file() or not (folder / SECOND).is_dir():
            return None
        index = read_index(folder)
        if not isinstance(index.get(SECOND), list) or None in index[SECOND]:
            return None
        ratio = index.get("boundary_ratio")
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
            what = f"{folder}/model_index.json: two denoisers and the boundary_ratio {ratio!r}"
            fix = "write the number between 0 and 1 that the pipeline was made with"
            raise InputError(what, fix=fix)
        return cls.from_boundary(ratio, count_timesteps(folder))

    @classmethod
    def parse(cls, text: str, total: int, *, also: str = "") -> Partition:
        """Read ranges of [0, total): `uniform:N`, `joint` (one range), a list, or a file of `load`.

        A list is `0:875,875:1000`, in any order.

        Args:
            also: what else the caller understands, named in the error, for example `none`.

        Raises:
            UsageError: if the text is none of these, or the ranges cover something else.
            InputError: if the file is not a partition.
        """
        kind, _, count = text.partition(":")
        if text == "joint" or (kind == "uniform" and count.isascii() and count.isdigit()):
            return cls.uniform(total, int(count or 1))
        if any(path.is_file() for path in (Path(text), Path(text) / "model_index.json")):
            partition = cls.load(Path(text))
        elif text[:1].isdigit():
            partition = cls(tuple(sorted(map(TimestepRange.parse, text.split(",")))))
        else:
            known = ", ".join(["uniform:N", "joint", "START:STOP,...", *([also] if also else [])])
            what = f"ranges '{text}' are neither {known} nor a file"
            raise UsageError(what, fix=f"for example uniform:4 or {cls.uniform(total, 2).text}")
        if partition.total != total:
            what = f"{text} covers {partition.total} timesteps, the base has {total}"
            raise UsageError(what, fix=f"give ranges that cover [0, {total})")
        return partition

    @classmethod
    def load(cls, path: Path | str) -> Partition:
        """Read a `partition.json`, or the folder of a pipeline of two denoisers.

        Raises:
            InputError: if the file has no list of ranges [[0, 250], ...] under the key `ranges`, or
                the pipeline has one denoiser.
        """
        path = Path(path)
        if path.is_dir():
            partition = cls.of_pipeline(path)
            if partition is None:
                what = f"{path}: not a pipeline of two denoisers"
                raise InputError(
                    what, fix="name a partition.json, or a pipeline with transformer_2"
                )
            return partition
        try:
            record = read_record(path, PartitionRecord, fix=FIX)
            return cls(tuple(TimestepRange(*span) for span in record.ranges))
        except (InputError, UsageError) as error:
            what = error.what.removeprefix(f"{path}: ")
            raise InputError(f"{path}: not a partition: {what}", fix=FIX) from error

    def save(self, path: Path | str) -> None:
        """Write `partition.json`."""
        record = PartitionRecord(ranges=tuple((r.start, r.stop) for r in self.ranges))
        commit_json(path, record.model_dump(mode="json"))

    @property
    def text(self) -> str:
        """The ranges as `parse` reads them: `0:250,250:1000`."""
        return ",".join(f"{span.start}:{span.stop}" for span in self)

    @property
    def total(self) -> int:
        """T, the number of training timesteps."""
        return self.ranges[-1].stop

    @property
    def cuts(self) -> list[int]:
        """The inner boundaries, ascending."""
        return [r.start for r in self.ranges[1:]]

    @property
    def boundary_ratio(self) -> float | None:
        """The b of diffusers' pipelines of two denoisers; None unless there are two ranges."""
        if len(self) != 2:
            return None
        cut, T = self.ranges[0].stop, self.total
        return cut / T if math.ceil(cut / T * T) == cut else math.nextafter(cut / T, 0)

    def route(self, t: float) -> int:
        """Return the index of the range that holds t; T, pure noise of a flow, is in the last.

        Raises:
            UsageError: if t lies outside [0, T].
        """
        if not 0 <= t <= self.total:
            what = f"timestep {t} lies outside [0, {self.total}]"
            raise UsageError(what, fix="use the timesteps of the base's schedule")
        return bisect_right(self.cuts, t)

    def __iter__(self) -> Iterator[TimestepRange]:
        return iter(self.ranges)

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, index: int) -> TimestepRange:
        return self.ranges[index]

    def __repr__(self) -> str:
        cuts = [str(place) for place in self.cuts]
        shown = cuts if len(cuts) <= SHOWN else [*cuts[:3], "...", cuts[-1]]
        return f"Partition.from_cuts({self.total}, [{', '.join(shown)}])"

    def __str__(self) -> str:
        return " ".join(str(r) for r in self.ranges)


def count_timesteps(pipeline: Path | None) -> int:
    """Return T of a pipeline's scheduler, 1000 if no file says it.

    Raises:
        InputError: if it is not a number of timesteps.
    """
    config = {} if pipeline is None else read_pipeline_scheduler(pipeline)
    T = config.get("num_train_timesteps", STEPS)
    if not isinstance(T, int) or not 1 < T < 1 << 20:
        fix = "use the scheduler_config.json of this model"
        raise InputError(f"{pipeline}: num_train_timesteps is {T!r}", fix=fix)
    return T
