"""The options of a partition into ranges, and those of `demerge ranges`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from demerge.errors import UsageError
from demerge.options import DataOptions, Options, Split, again, option
from demerge.timestep_conventions import Convention, DensityName, TrainerName

PANEL, PAGE, TRAINER = "Partition", "Commands on the page", "Other trainers"
Method = Literal["gradient", "hierarchical", "uniform", "logsnr"]
Score = Literal["step", "energy", "cosine"]


def parse_ranges(text: str) -> int | str | None:
    """Return a number of ranges, None for `auto`, or a text for `Partition.parse`."""
    if text == "auto":
        return None
    return int(text) if text.isascii() and text.isdigit() else text


@dataclass(frozen=True, kw_only=True, repr=False)
class PartitionOptions(Options):
    """How [0, T) is partitioned into ranges."""

    ranges: int | str | None = option(
        4,
        "Number of ranges, auto (as many as held-out groups support), or ranges of your own, such"
        " as 0:875,875:1000: are separate experts for them worth it?",
        ge=1,
        parse=parse_ranges,
        metavar="N|auto|A:B,...|FILE",
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
    ranges: int | str | None = again(PartitionOptions, "ranges", default=None, shown_default="auto")
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

    trainer: TrainerName | None = option(
        None,
        "Trainer whose flags or config lines are printed. The map may then also be a "
        "partition.json or a pipeline of two denoisers.",
        flags=("--for",),
        panel=TRAINER,
    )
    shift: float | None = option(
        None, "Shift of the trainer's timesteps.", gt=0, shown_default="1", panel=TRAINER
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift is not None and self.trainer is None:
            fix = "give --for TRAINER, for example --for musubi"
            raise UsageError(f"shift {self.shift:g} is of a trainer, and none is named", fix=fix)
        is_list = isinstance(self.ranges, str)
        if is_list and (self.method is not None or self.cuts is not None):
            what = f"ranges {self.ranges} fix the method and the cuts"
            raise UsageError(what, fix="leave out --method and --cuts")
        if self.cuts is None or is_list:
            return
        if self.method is not None or self.ranges not in (None, len(self.cuts) + 1):
            cuts = ",".join(str(cut) for cut in self.cuts)
            what = f"cuts {cuts} fix the method and {len(self.cuts) + 1} ranges"
            raise UsageError(what, fix="leave out --method and --ranges")


@dataclass(frozen=True, kw_only=True, repr=False)
class BoundaryOptions(Options):
    """A boundary between two experts, and how the timesteps of training are drawn."""

    boundary: float = option(help="Boundary between two experts.", argument=True)
    convention: Convention = option(
        "sigma",
        "What the number is: t or sigma after the shift, the share of a schedule's steps from "
        "noise on, or u before the shift.",
        flags=("--as",),
    )
    shift: float = option(1.0, "Shift s: sigma = s u / (1 + (s - 1) u).", gt=0)
    num_train_timesteps: int = option(1000, "Number of training timesteps T.", ge=2)
    density: DensityName = option("uniform", "Density of the draws of u in training.")
    logit_mean: float = option(0.0, "Mean of logit(u), for logit-normal; above 0 is more noise.")
    logit_std: float = option(1.0, "Standard deviation of logit(u), for logit-normal.", gt=0)
    mode_scale: float = option(1.29, "Scale of the mode density.", ge=-1, le=1.75)

    def __post_init__(self) -> None:
        super().__post_init__()
        top = self.num_train_timesteps if self.convention == "timestep" else 1
        rule = f"between 0 and {top} as {self.convention}; --as names another convention"
        self.require("boundary", 0 < self.boundary < top, rule)
