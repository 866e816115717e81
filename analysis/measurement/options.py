"""The options of a measurement and of `demerge analyze`.

The number of groups is fixed, or open: with a budget of seconds it is as many as fit, with a target
SE as many as it takes (budget.py). Then `groups` is the most there may be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from demerge.durations import parse_seconds
from demerge.errors import UsageError
from demerge.finetuning.options import FinetuneOptions
from demerge.options import (
    DataOptions,
    DeviceOptions,
    ModelOptions,
    Options,
    SeedOptions,
    again,
    option,
)

PANEL = "Measurement"
GROUPS, MAX_GROUPS = 8, 64  # if their number is not given: fixed, and open
DrawKind = Literal["shared", "independent"]
DRAWS: tuple[DrawKind, ...] = get_args(DrawKind)


@dataclass(frozen=True, kw_only=True, repr=False)
class MeasurementOptions(Options):
    """How gradients are measured."""

    bins: int = option(20, "Bins of timesteps.", ge=1, panel=PANEL)
    groups: int | None = option(
        None,
        "Groups of samples; their differences give the errors.",
        ge=5,  # MIN_GROUPS of demerge.conflict
        shown_default=f"{GROUPS}; at most {MAX_GROUPS} with --budget or --target-se",
        panel=PANEL,
    )
    batch_size: int = option(16, "Samples per bin and group.", ge=1, panel=PANEL)
    budget: float | None = option(
        None,
        "Time limit, such as 90s, 10m or 2h: measure as many groups as fit. Does not extend a map.",
        gt=0,
        lt=math.inf,
        parse=parse_seconds,
        panel=PANEL,
    )
    target_se: float | None = option(
        None,
        "Add groups until the similarity of neighbouring bins has this median SE, such as 0.02.",
        gt=0,
        lt=math.inf,
        panel=PANEL,
    )
    draws: DrawKind = option(
        "shared", "Whether the bins of a group share their samples or draw their own.", panel=PANEL
    )
    antithetic: Literal["off", "on", "auto"] = option(
        "off",
        "Use each noise with its opposite; auto does so in the bins where it helps.",
        panel=PANEL,
    )
    metric: Literal["euclid", "adam"] = option(
        "euclid", "How gradients are compared: as they are, or scaled as Adam does.", panel=PANEL
    )
    engine: Literal["auto", "exact", "sketch"] = option(
        "auto",
        "How gradients are stored; auto is exact if that fits --memory, else sketch.",
        panel=PANEL,
    )
    params: str = option(
        "all", "Parameters to take gradients of: all, lora, or a REGEX in their names.", panel=PANEL
    )
    lora_rank: int = option(16, "Rank of --params lora.", ge=1, panel=PANEL)
    target_modules: Sequence[str] = again(
        FinetuneOptions,
        "target_modules",
        help="Layers of --params lora, by their names or the ends of them. May be repeated.",
        panel=PANEL,
    )
    layers: bool = option(False, "Sketch each layer too, for `demerge layers`.", panel=PANEL)
    mixed_precision: Literal["no", "bf16"] = option(
        "no", "Precision of the model's passes.", panel=PANEL
    )
    memory: float = option(
        2.0, "Memory for the stored gradients, in GB.", gt=0, lt=math.inf, panel=PANEL
    )
    seed: int = again(SeedOptions, "seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.antithetic != "off" and self.batch_size % 2:
            what = f"batch size {self.batch_size} cannot be split into antithetic pairs"
            raise UsageError(what, fix="give an even --batch-size")
        if self.params != "lora":
            self.require("lora_rank", self.lora_rank == 16, "left out without --params lora")
            rule = "left out without --params lora"
            self.require("target_modules", not self.target_modules, rule)
        if self.target_se is not None and self.bins < 2:
            what = "a target SE compares neighbouring bins, and there is only one bin"
            raise UsageError(what, fix="give --bins 2 or more")

    @property
    def is_open(self) -> bool:
        """Whether the number of groups is found on the way."""
        return self.budget is not None or self.target_se is not None

    @property
    def most_groups(self) -> int:
        """The number of groups, or the most there may be."""
        if self.groups is not None:
            return self.groups
        return MAX_GROUPS if self.is_open else GROUPS


@dataclass(frozen=True, kw_only=True, repr=False)
class AnalyzeInputs(DataOptions, DeviceOptions):
    """What is analysed, on what, and where the results go."""

    model: str = again(ModelOptions, "model")
    out: Path = option(
        help="Folder that gets conflict.safetensors, partition.json and plots.",
        flags=("-o", "--out"),
    )
    fisher: str | None = option(
        None,
        "Measure the Fisher of each range too, into OUT/fisher, for `demerge merge`.",
        metavar="uniform:N|joint|FILE",
        panel=PANEL,
    )
