"""The options of `demerge coefficients`, `demerge landscape` and `demerge transfer`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demerge.analysis.partitioning.options import RangesOptions
from demerge.options import (
    DataOptions,
    DeviceOptions,
    ModelOptions,
    Options,
    SeedOptions,
    Split,
    again,
    option,
)

SAMPLES, SOLUTION, POINTS = "Samples", "Solution", "Points"


@dataclass(frozen=True, kw_only=True, repr=False)
class ExpertOptions(DataOptions, DeviceOptions):
    """A base, its experts, and the samples that both are measured on."""

    base: str = again(ModelOptions, "model")
    experts: list[str] = option(
        help="Models finetuned from the base, or LoRA files of it.",
        argument=True,
        metavar="EXPERT...",
    )
    ranges: str | None = option(
        None,
        "uniform:N, joint, 0:500,500:1000 or a partition.json.",
        panel=SAMPLES,
        shown_default="the ranges of the experts",
    )
    seed: int = again(SeedOptions, "seed")


@dataclass(frozen=True, kw_only=True, repr=False)
class CoefficientsOptions(ExpertOptions):
    """How the weights of a merge are found."""

    out: Path = option(
        help="A new .json file, for `demerge merge --weights`.", flags=("-o", "--out")
    )
    granularity: Literal["model", "block", "layer"] = option(
        "model", "Part of the model that gets merge weights of its own.", panel=SOLUTION
    )
    ridge: float | None = option(
        None,
        "How much weights are shrunk towards 0.",
        ge=0,
        lt=math.inf,
        panel=SOLUTION,
        shown_default="chosen by cross-validation",
    )
    relative: bool = option(
        False,
        "Divide each range's loss by the base's. Otherwise ranges of large losses decide alone.",
        panel=SOLUTION,
    )
    step: float = option(
        1.0, "Point on the way from base (0) to expert (1) at which to measure.", panel=SOLUTION
    )
    samples: int = option(
        512, "Samples per range, each with a timestep and noise.", ge=1, panel=SAMPLES
    )
    groups: int = option(
        16, "Groups of images. Errors come from their differences.", ge=5, panel=SAMPLES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("step", math.isfinite(self.step) and self.step != 0, "finite and not 0")


@dataclass(frozen=True, kw_only=True, repr=False)
class LandscapeOptions(ExpertOptions):
    """Where around a base the loss is measured."""

    split: Split = again(DataOptions, "split", default="test")
    out: Path | None = option(
        None, "A new folder for landscape.json, tables and plots.", flags=("-o", "--out")
    )
    merged: str | None = option(
        None, "Merged model to measure the loss on the way to, in place of experts.", panel=POINTS
    )
    plane: str = option(
        "auto",
        "Two experts by their numbers from 0 on, as 0,3; auto (those that agree least); none.",
        panel=POINTS,
    )
    points: int = option(4, "Steps from the base to an expert.", ge=1, panel=POINTS)
    samples: int = option(
        128, "Samples per range and point, the same at all points.", ge=16, panel=SAMPLES
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class TransferOptions(Options):
    """From which map, and for which experts, changes of the loss are predicted."""

    map: Path = again(RangesOptions, "map", metavar="MAP")
    experts: list[str] = again(ExpertOptions, "experts")
    base: str = option(
        help="The model that the map was measured on: folder, .safetensors file or Hub id."
    )
    ranges: str | None = again(ExpertOptions, "ranges", panel=None)
    out: Path | None = option(
        None, "Folder that gets transfer.json and the plots.", flags=("-o", "--out")
    )
    skip_text_encoder: bool = option(
        False, "Leave out what a LoRA does to text encoders. Else such a LoRA is an error."
    )
