"""The options of a finetune. The training options are recorded in every checkpoint and expert."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from demerge.durations import parse_seconds, write_seconds
from demerge.errors import UsageError
from demerge.options import (
    DataOptions,
    DeviceOptions,
    Options,
    SeedOptions,
    again,
    option,
)

TRAINING, OBJECTIVE, LORA, DATA = "Training", "Objective", "LoRA", "Data"
SPEED, STATE = "Speed and memory", "Checkpoints and logs"
# what may change between two runs of one expert: how often it saves, and how it is computed
FREE = frozenset(
    {
        "allow_tf32",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "compile",
        "cuda_graph",
        "gradient_checkpointing",
        "logging_steps",
        "num_previews",
        "preview_steps",
        "report_to",
        "resume_from_checkpoint",
        "save_every",
    }
)
Decay = Literal["constant", "linear", "cosine"]
TRACKERS = ("tensorboard", "wandb", "trackio")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the layers that get a LoRA by default
LONGEST = 0.28  # of an average, as sigma_rel; 12 ** -0.5 is the plain mean of all steps
SNAPSHOTS = 8  # of each length by default


def parse_texts(texts: Sequence[str]) -> tuple[str, ...]:
    """Read values that are separated by commas."""
    return tuple(part.strip() for text in texts for part in str(text).split(","))


def parse_lengths(texts: Sequence[str]) -> tuple[float, ...]:
    """Read lengths of averages, in the order of their size.

    Raises:
        UsageError: if one is no number.
    """
    try:
        return tuple(sorted({float(text) for text in parse_texts(texts)}))
    except ValueError as error:
        what = f"--ema-lengths: {error}"
        raise UsageError(what, fix="give numbers such as 0.05 and 0.10") from error


def bucket_sizes(text: str) -> list[tuple[int, int]]:
    """Read sizes such as `768,1344;1024,1024`, as (H, W).

    Raises:
        UsageError: if it is something else.
    """
    sizes = []
    for part in text.split(";"):
        match = re.fullmatch(r"\s*(\d{1,5})\s*,\s*(\d{1,5})\s*", part)
        if match is None or 0 in (int(match[1]), int(match[2])):
            what = f"--aspect-ratio-buckets: '{part}' is not a height and a width"
            raise UsageError(what, fix="give pairs such as 768,1344;1024,1024")
        sizes.append((int(match[1]), int(match[2])))
    return sizes


@dataclass(frozen=True, kw_only=True, repr=False)
class FinetuneOptions(Options):
    """How experts are trained, in the names of diffusers' training scripts.

    `demerge.finetuning.objective` defines the objective.
    """

    max_train_steps: int = option(1000, "Optimizer steps per expert.", panel=TRAINING, ge=1)
    train_batch_size: int = option(64, "Images per batch, in each process.", panel=TRAINING, ge=1)
    gradient_accumulation_steps: int = option(
        1, "Batches per optimizer step.", panel=TRAINING, ge=1
    )
    learning_rate: float = option(5e-5, "Peak learning rate.", panel=TRAINING, gt=0, le=1)
    optimizer: Literal["adamw", "adamw-8bit", "prodigy", "schedule-free"] = option(
        "adamw", "Optimizer; the last three need a package of their own.", panel=TRAINING
    )
    lr_scheduler: Decay = option("constant", "Learning rate over the run.", panel=TRAINING)
    lr_warmup_steps: int = option(0, "Steps of linear warm-up.", panel=TRAINING, ge=0)
    adam_beta1: float = option(0.95, "AdamW beta 1.", panel=TRAINING, ge=0, lt=1)
    adam_beta2: float = option(0.999, "AdamW beta 2.", panel=TRAINING, ge=0, lt=1)
    adam_weight_decay: float = option(1e-6, "AdamW decay.", panel=TRAINING, ge=0, lt=math.inf)
    adam_epsilon: float = option(1e-8, "AdamW epsilon.", panel=TRAINING, gt=0, le=1)
    max_grad_norm: float = option(1.0, "Largest norm of the gradient.", panel=TRAINING, gt=0)
    global_prob: float = option(
        0.3, "Probability of a timestep from all of [0, T).", panel=OBJECTIVE, ge=0, le=1
    )
    sampling: Literal["mixture", "paper"] = option(
        "mixture", "Draw of timesteps: by sample, or by batch as the paper does.", panel=OBJECTIVE
    )
    consistency: float = option(
        1.0, "Weight lambda of the distance to the base.", panel=OBJECTIVE, ge=0, lt=math.inf
    )
    consistency_schedule: Decay = option("constant", "Lambda over the run.", panel=OBJECTIVE)
    loss_weight: Literal["one", "min-snr", "truncated-snr", "snr+1", "p2", "uncertainty"] = option(
        "one", "Weight of the loss by timestep; uncertainty is learned.", panel=OBJECTIVE
    )
    p2_k: float = option(1.0, "k of p2.", panel=OBJECTIVE, gt=0, lt=math.inf)
    p2_gamma: float = option(1.0, "Gamma of p2.", panel=OBJECTIVE, ge=0, lt=math.inf)
    density: Literal["uniform", "logit-normal", "mode"] = option(
        "uniform", "Density of t before the shift, for flow matching.", panel=OBJECTIVE
    )
    logit_mean: float = option(
        0.0, "Mean of logit-normal; above 0 draws more noise.", panel=OBJECTIVE, ge=-10, le=10
    )
    logit_std: float = option(
        1.0, "Standard deviation of logit-normal.", panel=OBJECTIVE, gt=0, le=10
    )
    mode_scale: float = option(1.29, "Scale of mode.", panel=OBJECTIVE, ge=-1, le=1.75)
    shift: float | None = option(
        None,
        "Shift of t in training, for flow matching.",
        panel=OBJECTIVE,
        gt=0,
        le=1000,
        shown_default="the base's own",
    )
    antithetic: bool = option(
        False, "Draw samples in pairs: same image, same timestep, opposite noise.", panel=OBJECTIVE
    )
    snr_gamma: float = option(5.0, "Gamma of min-snr.", panel=OBJECTIVE, gt=0, lt=math.inf)
    projection: Literal["foldable", "paper", "none"] = option(
        "foldable",
        "Channel-wise projection: folded into the weights, or kept behind each block of the UNet"
        " as the paper does; paper experts cannot be merged.",
        panel=OBJECTIVE,
    )
    lora_rank: int | None = option(
        None,
        "Train a LoRA of this rank, and write it instead of a whole model; needs peft. The base is"
        " frozen, in the dtype of --mixed-precision. --projection is none.",
        panel=LORA,
        ge=1,
        shown_default="all weights train",
    )
    lora_alpha: float | None = option(
        None,
        "Alpha: the LoRA counts alpha / rank times.",
        panel=LORA,
        gt=0,
        lt=math.inf,
        shown_default="the rank",
    )
    target_modules: Sequence[str] = option(
        (),
        "Layers that get a LoRA, by their names or the ends of them. May be repeated.",
        panel=LORA,
        parse=parse_texts,
        multiple=True,
        metavar="NAME",
        shown_default=",".join(ATTENTION),
    )
    use_ema: bool = option(True, "Keep a moving average of the weights.", panel=TRAINING)
    ema_decay: float = option(0.9999, "Largest decay of the average.", panel=TRAINING, ge=0, lt=1)
    ema_lengths: Sequence[float] = option(
        (),
        "Also keep a power-function average of this length (sigma_rel, EDM2) and store snapshots"
        " of it, for `demerge ema`. May be repeated; 0.05 and 0.10 fit most. Each costs one copy of"
        " the trained weights in memory, and one on disk per snapshot.",
        panel=TRAINING,
        parse=parse_lengths,
        multiple=True,
        metavar="SIGMA_REL",
    )
    ema_snapshot_steps: int | None = option(
        None,
        "Steps between snapshots of --ema-lengths.",
        panel=TRAINING,
        ge=1,
        shown_default="an eighth of the run",
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "Sizes in pixels, such as 768,1344;1024,1024: each image of a folder is trained at the one"
        " whose aspect is nearest.",
        panel=DATA,
        metavar="H,W;H,W",
        shown_default="all images are square",
    )
    random_flip: bool = option(False, "Mirror half of the images.", panel=DATA)
    caption_dropout: float = option(0.1, "Share of captions left empty.", panel=DATA, ge=0, le=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "Autocast dtype; fp16 scales the loss.", panel=SPEED
    )
    allow_tf32: bool = option(
        False, "Multiply float32 matrices as TF32 on a GPU that can.", panel=SPEED
    )
    gradient_checkpointing: bool = option(
        False, "Compute activations again in the backward pass: less memory, slower.", panel=SPEED
    )
    cuda_graph: Literal["auto", "on", "off"] = option(
        "auto", "Capture the whole step as a CUDA graph; auto: on a GPU, if possible.", panel=SPEED
    )
    compile: bool = option(
        False, "Compile the model with torch.compile, channels last; for long runs.", panel=SPEED
    )
    save_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", "dtype of the experts on disk.", panel=TRAINING
    )
    fisher_samples: int = option(
        0, "Images for the Fisher of `merge --method fisher`.", panel=TRAINING, ge=0
    )
    checkpointing_steps: int = option(500, "Steps between checkpoints.", panel=STATE, ge=1)
    save_every: float | None = option(
        None,
        "Also save after this time, for example 90s, 30m or 2h.",
        panel=STATE,
        parse=parse_seconds,
        write=write_seconds,
        shown_default="by steps alone",
        metavar="TIME",
    )
    checkpoints_total_limit: int = option(
        1, "Checkpoints that are kept; older ones are deleted.", panel=STATE, ge=1
    )
    resume_from_checkpoint: Literal["latest", "never"] = option(
        "latest", "Which checkpoint is continued; never: a checkpoint is an error.", panel=STATE
    )
    logging_steps: int = option(50, "Steps between lines of log.jsonl.", panel=STATE, ge=1)
    preview_steps: int = option(
        0, "Steps between previews: images beside those of the base; 0 is none.", panel=STATE, ge=0
    )
    num_previews: int = option(8, "Images of a preview.", panel=STATE, ge=1)
    report_to: Sequence[str] = option(
        (),
        "Tracker that gets the log: tensorboard, wandb or trackio. May be repeated.",
        panel=STATE,
        parse=parse_texts,
        multiple=True,
        metavar="NAME",
    )
    seed: int = again(SeedOptions, "seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aspect_ratio_buckets is not None:
            bucket_sizes(self.aspect_ratio_buckets)
        if self.antithetic:
            is_even = self.train_batch_size % 2 == 0
            self.require("train_batch_size", is_even, "even with --antithetic")
            self.require("sampling", self.sampling == "mixture", "mixture with --antithetic")
        if self.optimizer == "schedule-free":
            rule = "False with schedule-free, which averages by itself: give --no-use-ema"
            self.require("use_ema", not self.use_ema, rule)
            rule = "empty with schedule-free, which averages by itself"
            self.require("ema_lengths", not self.ema_lengths, rule)
        if self.lora_rank is None:
            rule = "left out without --lora-rank"
            self.require("lora_alpha", self.lora_alpha is None, rule)
            self.require("target_modules", not self.target_modules, rule)
        else:
            rule = "none with --lora-rank: W K has full rank"
            self.require("projection", self.projection != "paper", rule)
            object.__setattr__(self, "projection", "none")
            rule = "0 with --lora-rank, whose experts have no whole weights"
            self.require("fisher_samples", self.fisher_samples == 0, rule)
            object.__setattr__(self, "target_modules", tuple(self.target_modules) or ATTENTION)
        are_known = set(self.report_to) <= set(TRACKERS)
        self.require("report_to", are_known, f"some of {', '.join(TRACKERS)}")
        are_lengths = all(0 < length <= LONGEST for length in self.ema_lengths)
        self.require("ema_lengths", are_lengths, f"above 0 and at most {LONGEST}")

    def steps_between_snapshots(self) -> int:
        """Return the steps between two snapshots of `ema_lengths`."""
        return self.ema_snapshot_steps or -(-self.max_train_steps // SNAPSHOTS)

    def samples_per_step(self, processes: int = 1) -> int:
        """Return the number of samples of an optimizer step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def binding(self, step: int | None = None) -> dict[str, Any]:
        """Return the options that must equal the recorded ones to continue or reuse recorded work.

        The options in `FREE` may always change. If an unfinished run stopped at `step`,
        the options of its end may change too. So may the number of steps, if the steps that were
        taken stay the same.
        """
        free = set(FREE)
        if step is not None:
            free |= {"fisher_samples", "save_dtype"}
            constant = self.lr_scheduler == self.consistency_schedule == "constant"
            if constant and self.max_train_steps >= step:
                free.add("max_train_steps")
        return {name: value for name, value in self.document().items() if name not in free}


@dataclass(frozen=True, kw_only=True, repr=False)
class FinetuneInputs(DataOptions, DeviceOptions):
    """The base, the data and the output folder."""

    model: str = option(
        help="Pipeline folder or Hub id; with --init random a model config (JSON).", argument=True
    )
    out: Path = option(help="Folder that gets one expert folder per range.", flags=("-o", "--out"))
    ranges: str | None = option(
        None,
        "uniform:N, joint, joint:K (K times the steps), 0:500,500:1000, or a partition.json.",
        shown_default="uniform:4",
    )
    only: Sequence[str] = option(
        (),
        "One of the ranges, for example 0:250, if not all are trained. May be repeated.",
        parse=tuple,
        multiple=True,
        metavar="RANGE",
        recorded=False,
    )
    num_processes: int | None = option(
        None,
        "Processes that the launcher must have started; another number is an error.",
        panel=SPEED,
        ge=1,
        shown_default="any",
    )
    cache_latents: Path | None = option(
        None,
        "Folder that keeps latents and text embeddings, encoded once and not at each step. Runs may"
        " share it; the experts are the same bits.",
        panel=SPEED,
        metavar="FOLDER",
    )
    init: Literal["pretrained", "random"] = option(
        "pretrained", "Start from the model's weights, or train a base from random ones."
    )
    train_layers: Path | None = option(
        None, "layers.json of `demerge layers`: the layers to train.", panel=TRAINING
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class ReaverageOptions(Options):
    """Which expert gets which average."""

    run: Path = option(
        help="Folder of an expert that was trained with --ema-lengths.", argument=True
    )
    sigma_rel: float = option(
        help="Length of the average, as its width by the steps of the run.", gt=0, le=LONGEST
    )
    out: Path = option(help="Folder that gets the expert.", flags=("-o", "--out"))
