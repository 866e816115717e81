"""The options of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demerge.diffusion.options import SAMPLING, SamplingOptions
from demerge.errors import UsageError
from demerge.options import DataOptions, DeviceOptions, Options, Split, again, option, parse_numbers

METRICS = "Metrics"
Preprocess = Literal["clean", "pytorch-fid", "torch-fidelity"]
Precision = Literal["no", "bf16"]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `0,1,2`: different seeds, each at least 0."""
    seeds = parse_numbers(text, "seeds")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds '{text}' name one seed twice", fix="for example --seeds 0,1,2")
    return seeds


@dataclass(frozen=True, kw_only=True, repr=False)
class EvaluationOptions(SamplingOptions, DeviceOptions):
    """What models are scored on, and how."""

    num_images: int = option(2000, "Images per model and seed.", panel=SAMPLING, ge=2)
    seeds: Sequence[int] = option(
        (0, 1, 2), "Sampling seeds; a verdict needs three.", panel=SAMPLING, parse=parse_seeds
    )
    split: Split = again(DataOptions, "split", default="test", help="Split of the real images.")
    skip_broken: bool = again(DataOptions, "skip_broken")
    features: str = option(
        "auto",
        "digits-cnn, random, or inception:FILE (pytorch-fid's .pth, or safetensors);"
        " auto takes digits-cnn for the digits, else random.",
        panel=METRICS,
    )
    preprocess: Preprocess = option("clean", "Resize in front of Inception.", panel=METRICS)
    features_precision: Precision = option("no", "Autocast dtype of Inception.", panel=METRICS)
    reference: Path | None = option(
        None,
        "Statistics of real images in place of --data's (.npz of pytorch-fid, EDM or ADM).",
        panel=METRICS,
    )
    reference_images: int | None = option(
        None,
        "Number of real images; with --reference, the number its statistics stand for.",
        panel=METRICS,
        ge=2,
        shown_default="all",
    )
    ranges: str = option(
        "uniform:4",
        "Ranges of the validation loss: uniform:N, 0:500,500:1000, a partition.json, or none.",
        panel=METRICS,
    )
    loss_samples: int = option(512, "Draws of the loss per range.", panel=METRICS, ge=16)
    lpips: bool = option(True, "LPIPS drift and diversity.", panel=METRICS)


@dataclass(frozen=True, kw_only=True, repr=False)
class EvaluationInputs(Options):
    """Which models are scored, against which images, and where the scores go."""

    models: list[str] = option(
        help="Pipelines, folders of experts (routed), or folders of images; NAME=MODEL names one.",
        argument=True,
    )
    data: str = again(DataOptions, "data")
    base: str | None = option(
        None, "Base model.", shown_default="the first stock pipeline among MODELS"
    )
    out: Path = option(help="Run folder; scores go to OUT/scores.", flags=("-o", "--out"))


@dataclass(frozen=True, kw_only=True, repr=False)
class CompareOptions(Options):
    """Which scores are compared, and where the report goes."""

    runs: list[Path] = option(help="A run folder with scores/, or score files.", argument=True)
    out: Path | None = option(
        None, "Folder of the report.", flags=("-o", "--out"), shown_default="RUN/report"
    )
    title: str = option("demerge report", "Title of the report.")
