"""The options of drawing images, for `demerge sample` and `demerge evaluate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from demerge.options import (
    DeviceOptions,
    ModelOptions,
    Options,
    SeedOptions,
    again,
    option,
    parse_numbers,
)

SAMPLING = "Sampling"


@dataclass(frozen=True, kw_only=True, repr=False)
class SamplingOptions(Options):
    """How a model draws images.

    Raises:
        UsageError: if a value breaks its rule.
    """

    steps: int = option(50, "Sampling steps.", panel=SAMPLING, ge=1)
    sampler: Literal["ddim", "base"] = option(
        "ddim", "Sampler; base is the base model's own scheduler.", panel=SAMPLING
    )
    guidance_scale: float = option(
        1.0,
        "Classifier-free guidance of text-to-image models and DiT; 1 is none."
        " Stock pipelines take 7.5 and 4.",
        panel=SAMPLING,
        ge=1,
        lt=math.inf,
    )
    batch_size: int = option(64, "Images per forward pass.", panel=SAMPLING, ge=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "dtype of the denoiser: weights in bf16, or autocast to fp16.", panel=SAMPLING
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class SampleOptions(SamplingOptions):
    """Which images a model draws, and how."""

    num_images: int = option(16, "Number of images.", panel=SAMPLING, ge=1)
    labels: Sequence[int] | None = option(
        None,
        "Class numbers for class-conditional models, for example 3,3,7, repeated in turn.",
        panel=SAMPLING,
        parse=partial(parse_numbers, what="labels"),
        shown_default="every class in turn",
    )
    seed: int = again(
        SeedOptions, "seed", help="Seed; image i depends on the seed and i alone.", panel=SAMPLING
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class SampleInputs(DeviceOptions):
    """What draws images, from what, and where they go."""

    model: str = again(ModelOptions, "model")
    out: Path = option(help="Folder that gets 000000.png and so on.", flags=("-o", "--out"))
    experts: Path | None = option(
        None, "Folder of experts; the routed ensemble is sampled on MODEL's schedule."
    )
    captions: Path | None = option(
        None, "Text file with one caption per line, for text-to-image models."
    )
