"""The options of a merge. `Recipe` adds the models to them; the command line reads both classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from demerge.errors import UsageError
from demerge.options import DeviceOptions, Options, SeedOptions, again, option

HOW, PARTS, MODELS, OUTPUT, RUNNING = (
    "How to merge",
    "Which parts",
    "Experts and bases",
    "Output",
    "Running",
)
WEIGHT_FILES = (".json", ".yaml", ".yml", ".csv")


def parse_weights(text: str) -> list[float] | Path:
    """Return one number per expert, or the path of a file of weights.

    Raises:
        UsageError: if the text is neither.
    """
    if text.endswith(WEIGHT_FILES):
        return Path(text)
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        fix = "for example --weights 0.3,0.3, or a file that ends in .json, .yaml or .csv"
        raise UsageError(f"weights '{text}' are not numbers", fix=fix) from error


def parse_method_options(texts: Sequence[str]) -> dict[str, str]:
    """Return the values by name of texts NAME=VALUE.

    Raises:
        UsageError: if a text has no `=`.
    """
    options: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            fix = "for example --option density=0.2"
            raise UsageError(f"option '{text}' has no value", fix=fix)
        options[name.strip().replace("-", "_")] = value
    return options


@dataclass(frozen=True, kw_only=True, repr=False)
class MergeOptions(Options):
    """How models are merged.

    Attributes:
        weights: numbers, or a file of `demerge.merging.recipe.weight_files`; None gives 1/K each.
        options: the method's own. NAME=PATHS names the files of a statistic that it needs;
            without it they are looked for next to the experts.
        rules: `Rule` values, or their texts.
        save_dtype: keep stores the base's dtypes; scaled fp8 gets scales that hold the merge, and
            float8 without scales becomes bfloat16. A float8 dtype is for matrices.
        boundary: in units of the T timesteps, as diffusers' `boundary_ratio`.

    Raises:
        UsageError: if a value breaks its rule.
    """

    method: str = option(
        "task_arithmetic",
        "Name from `demerge methods`, weighted_sum, add_difference, or path.py:function.",
        panel=HOW,
    )
    weights: Sequence[float] | Path | str | None = option(
        None,
        "Numbers, one per expert, separated by commas; or a .json, .yaml or .csv file of weights"
        " for the model, blocks and tensors.",
        panel=HOW,
        parse=parse_weights,
        shown_default="1/K each",
    )
    options: Mapping[str, Any] = option(
        factory=dict,
        help="Option of the method as NAME=VALUE; may be repeated.",
        panel=HOW,
        flags=("--option",),
        parse=parse_method_options,
        multiple=True,
    )
    seed: int = again(SeedOptions, "seed", panel=HOW)
    rules: Sequence[Any] = option(
        (),
        "'PATTERN weights=W,W NAME=VALUE ...' for some tensors; the first match wins. Patterns:"
        " down_blocks.*.attentions.**, up.1, mid, attn, up.conv, IN04, OUT11. 0.2..0.8 is a ramp"
        " over depth. May be repeated.",
        panel=PARTS,
        flags=("--rule",),
        parse=tuple,
        multiple=True,
    )
    only: Sequence[str] = option(
        (),
        "Pattern of the tensors to merge; the others stay the base's. May be repeated.",
        panel=PARTS,
        parse=tuple,
        multiple=True,
    )
    components: str | None = option(
        None,
        "Text encoder, VAE and other parts of pipelines: denoiser keeps the base's, all merges"
        " those that differ, or a list (denoiser,text_encoder).",
        panel=PARTS,
        shown_default="a part that differs is an error",
    )
    variant: str | None = option(
        None, "Which weights of a folder to read, for example fp16.", panel=MODELS
    )
    no_base: bool = option(
        False,
        "Merge all models named, the first one too, without a base; for methods such as average.",
        panel=MODELS,
    )
    skip_text_encoder: bool = option(
        False, "Ignore what a LoRA changes in text encoders (an error otherwise).", panel=MODELS
    )
    missing: Literal["error", "base"] = option(
        "error", "Tensors that an expert lacks: an error, or keep the base's.", panel=MODELS
    )
    extra: Literal["error", "drop"] = option(
        "error", "Tensors that only an expert has: an error, or drop them.", panel=MODELS
    )
    boundary: float | None = option(
        None,
        "Write a pipeline of two denoisers that change at this share of the timesteps.",
        panel=OUTPUT,
    )
    lora_rank: int | None = option(
        None, "Write a LoRA of this rank instead of a model.", panel=OUTPUT, ge=1
    )
    lora_format: Literal["auto", "diffusers", "comfy", "kohya"] = option(
        "auto",
        "Names in the LoRA: of diffusers, of ComfyUI, or of kohya and musubi; auto takes those of"
        " the base, or of the LoRA files.",
        panel=OUTPUT,
    )
    save_dtype: Literal[
        "keep", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"
    ] = option(
        "keep",
        "dtype of the merged weights; keep is the base's, but bfloat16 for float8 without scales.",
        panel=OUTPUT,
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class MergeInputs(Options):
    """What `demerge merge` reads and writes, and where it runs.

    Raises:
        UsageError: if two of the options contradict each other.
    """

    base: str | None = option(
        None,
        "Pipeline folder, component folder, .safetensors file, shard index or Hub id.",
        argument=True,
    )
    experts: Sequence[str] = option(
        (),
        "Models finetuned from the base, the folder of `demerge finetune`, or LoRA files.",
        argument=True,
        metavar="EXPERT...",
        parse=tuple,
        multiple=True,
    )
    out: Path | None = option(
        None, "New folder, or new .safetensors file.", flags=("-o", "--out"), panel=OUTPUT
    )
    recipe: Path | None = option(
        None,
        "Recipe (.yaml, also mergekit's), demerge.json or merged model to take everything from;"
        " other flags win over it.",
        panel=HOW,
    )
    verify: bool = option(
        False, "Repeat the merge of --recipe, write nothing, compare hashes.", panel=HOW
    )
    ranges: Sequence[str] = option(
        (),
        "Timestep range of an expert, START:STOP or none. Give it once per expert, in their order.",
        panel=MODELS,
        flags=("--range",),
        parse=tuple,
        multiple=True,
    )
    report: bool = option(
        False,
        "Write tables and plots of each block to OUT/report, or to NAME-report next to a file.",
        panel=OUTPUT,
    )
    report_dir: Path | None = option(None, "New folder for the report.", panel=OUTPUT)
    device: str = again(DeviceOptions, "device", default="cpu", panel=RUNNING)
    num_workers: int | None = option(
        None,
        "Processes that share the work.",
        panel=RUNNING,
        ge=1,
        shown_default="the cores, up to 4",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.recipe is None) == (self.base is None):
            what = "base and experts come from the command line or from --recipe"
            raise UsageError(what, fix="demerge merge BASE EXPERT... -o OUT")
        self.check_verify()

    def check_verify(self, changes: Collection[str] = (), *, dry_run: bool = False) -> None:
        """Refuse --verify with options that change the merge of its recipe."""
        has_other = self.recipe is None or self.report or self.report_dir or self.ranges
        if self.verify and (has_other or dry_run or set(changes) - {"method"}):
            what = "--verify repeats the merge of a recipe without changes"
            raise UsageError(what, fix="demerge merge --recipe FILE --verify")
