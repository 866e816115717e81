"""The options of a partition into ranges, and those of `demerge ranges`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from demerge.errors import UsageError
from demerge.options import DataOptions, Options, Split, again, option

PANEL, PAGE = "Partition", "Commands on the page"
Method = Literal["gradient", "hierarchical", "uniform", "logsnr"]
Score = Literal["step", "energy", "cosine"]


def parse_range_count(text: str) -> int | None:
    """Return a number of ranges, None for `auto`."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit()):
        fix = "give a whole number from 1 on, or auto"
        raise UsageError(f"'{text}' is not a number of ranges", fix=fix)
    return int(text)


@dataclass(frozen=True, kw_only=True, repr=False)
class PartitionOptions(Options):
    """How [0, T) is partitioned into ranges."""

    ranges: int | None = option(
        4,
        "Number of ranges; auto is as many as held-out groups support.",
        ge=1,
        parse=parse_range_count,
        metavar="N|auto",
        panel=PANEL,
    )
    method: Method = option("gradient", "How boundaries are chosen.", panel=PANEL)
    score: Score = option(
        "step",
        "Gain that boundaries maximise: of steps of fixed length, gradient steps or directions.",
        panel=PANEL,
    )


def parse_cuts(text: str) -> tuple[int, ...]:
    """Read a list of timesteps: `125,500`."""
    fix = "give ascending timesteps above 0, for example --cuts 125,500"
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text, re.ASCII):
        raise UsageError(f"cuts '{text}' are not a list of timesteps", fix=fix)
    cuts = tuple(int(word) for word in text.split(","))
    if not all(a < b for a, b in pairwise([0, *cuts])):
        raise UsageError(f"cuts '{text}' do not ascend from above 0", fix=fix)
    return cuts


@dataclass(frozen=True, kw_only=True, repr=False)
class RangesOptions(Options):
    """What `demerge ranges` reads, how it partitions, and what it writes."""

    map: Path = option(
        help="conflict.safetensors of `demerge analyze`, or its folder.", argument=True
    )
    ranges: int | None = again(PartitionOptions, "ranges", default=None, shown_default="auto")
    method: Literal["advised", Method] | None = option(
        None,
        "How boundaries are chosen; advised is gradient if that beats uniform, else uniform.",
        shown_default="advised",
        panel=PANEL,
    )
    score: Score = again(PartitionOptions, "score")
    cuts: tuple[int, ...] | None = option(
        None,
        "Cuts of your own in place of a method, for example 125,500.",
        parse=parse_cuts,
        metavar="T,T,...",
        panel=PANEL,
    )
    minimum: int | None = option(
        None,
        "Least width of a range in bins, for gradient and hierarchical.",
        ge=1,
        shown_default="a twentieth of [0, T)",
        panel=PANEL,
    )
    model: str | None = option(
        None, "Base of the map; an error if the map was measured on other weights.", panel=PAGE
    )
    data: str | None = again(DataOptions, "data", default=None, panel=PAGE)
    split: Split = again(DataOptions, "split", panel=PAGE)
    out: Path | None = option(
        None,
        "File that gets the ranges, for example partition.json; conflict.html goes next to it.",
        flags=("-o", "--out"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cuts is None:
            return
        if self.method is not None or self.ranges not in (None, len(self.cuts) + 1):
            cuts = ",".join(str(cut) for cut in self.cuts)
            what = f"cuts {cuts} fix the method and {len(self.cuts) + 1} ranges"
            raise UsageError(what, fix="leave out --method and --ranges")
