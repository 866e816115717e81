"""`demerge merge`: a base and its experts into one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from demerge.cli.common import Device, Json, emit, progress, say

if TYPE_CHECKING:
    from demerge.merging import Recipe
    from demerge.timesteps import TimestepRange

WHAT, PARTS, MODELS, RUN, OUT = (
    "How to merge",
    "Which parts",
    "Experts and bases",
    "Running",
    "Output",
)
Texts = list[str] | None


def merge(
    base: Annotated[
        str | None,
        typer.Argument(
            help="Pipeline folder, component folder, .safetensors file, shard index or Hub id.",
            show_default=False,
        ),
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="EXPERT...",
            help="Models finetuned from the base, the folder of experts that finetune made, or LoRA files.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="A new folder, or a new .safetensors file.", rich_help_panel=OUT
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="A name of `demerge methods`, weighted_sum, add_difference, or path.py:function; task_arithmetic by default.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="One number per expert, comma-separated, 1/K each by default; or a .json, .yaml or .csv file of weights for "
            "the model, blocks and tensors.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    option: Annotated[
        Texts,
        typer.Option(
            "--option", help="NAME=VALUE of the method; may be repeated.", rich_help_panel=WHAT
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, help="Seed of every random number; 0 by default.", rich_help_panel=WHAT
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Take it all from a recipe (.yaml, also mergekit's), a demerge.json or a merged model; options here win.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Make the merge of --recipe again, write nothing, compare hashes.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    rule: Annotated[
        Texts,
        typer.Option(
            "--rule",
            help="'PATTERN weights=W,W NAME=VALUE ...' for some tensors; the first that matches wins; 0.2..0.8 is a ramp over "
            "depth. Patterns: down_blocks.*.attentions.**, up.1, mid, attn, up.conv, IN04, OUT11. May be repeated.",
            rich_help_panel=PARTS,
        ),
    ] = None,
    only: Annotated[
        Texts,
        typer.Option(
            "--only",
            help="Merge what this pattern matches, keep the rest of the base; may be repeated.",
            rich_help_panel=PARTS,
        ),
    ] = None,
    ranges: Annotated[
        Texts,
        typer.Option(
            "--range",
            help="START:STOP timesteps of an expert, or none; once for each, in their order.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="Which weights of a folder to read, for example fp16.", rich_help_panel=MODELS
        ),
    ] = None,
    no_base: Annotated[
        bool,
        typer.Option(
            "--no-base",
            help="There is no base: merge the models named, the first one, too. For methods that need none, as average.",
            rich_help_panel=MODELS,
        ),
    ] = False,
    skip_text_encoder: Annotated[
        bool,
        typer.Option(
            "--skip-text-encoder",
            help="Leave out what a LoRA does to text encoders, else refused.",
            rich_help_panel=MODELS,
        ),
    ] = False,
    components: Annotated[
        str | None,
        typer.Option(
            help="Text encoder, VAE and other parts of pipelines: denoiser keeps the base's, all merges those that differ, "
            "or a list (denoiser,text_encoder). By default a part that differs is refused.",
            rich_help_panel=PARTS,
        ),
    ] = None,
    missing: Annotated[
        str | None,
        typer.Option(
            help="Tensors that an expert lacks: error, or base to keep the base's.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    extra: Annotated[
        str | None,
        typer.Option(
            help="Tensors that only an expert has: error, or drop to leave them out.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    boundary: Annotated[
        float | None,
        typer.Option(
            help="Make a pipeline of two denoisers that change at this share of the timesteps.",
            rich_help_panel=OUT,
        ),
    ] = None,
    out_rank: Annotated[
        int | None,
        typer.Option(
            "--out-rank", min=1, help="Write a LoRA of this rank, not a model.", rich_help_panel=OUT
        ),
    ] = None,
    save_dtype: Annotated[
        str | None,
        typer.Option(
            "--save-dtype",
            help="keep, float32, float16 or bfloat16; keep by default.",
            rich_help_panel=OUT,
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Write tables and plots of what the merge did to each block into OUT/report; of a .safetensors file, to "
            "NAME-report next to it.",
            rich_help_panel=OUT,
        ),
    ] = False,
    report_dir: Annotated[
        Path | None,
        typer.Option("--report-dir", help="The same, to this new folder.", rich_help_panel=OUT),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check, measure what survives the rounding, print the plan, write nothing.",
            rich_help_panel=RUN,
        ),
    ] = False,
    device: Device = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that share the work; the cores, up to 4, by default.",
            rich_help_panel=RUN,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Merge experts into one model of the base's architecture.

    A pipeline folder in gives a pipeline folder out, which loads with stock diffusers and holds the recipe:

        demerge merge base expert-0 expert-1 -o merged --method ties --option density=0.2 --rule "mid density=0.5 scope=tensor"
    """
    from demerge.device import resolve_device
    from demerge.errors import UsageError
    from demerge.merging import prepare
    from demerge.merging import verify as make_again
    from demerge.storage.atomic import check_is_new

    asked = _given(
        method=method,
        options=_pairs(option),
        seed=seed,
        rules=rule,
        only=only,
        ranges=_ranges(ranges),
        variant=variant,
        boundary=boundary,
        out_rank=out_rank,
        save_dtype=save_dtype,
        skip_text_encoder=skip_text_encoder or None,
        components=components,
        missing=missing,
        extra=extra,
        no_base=no_base or None,
    )
    what = _recipe(recipe, base, experts or [], weights, asked)
    device = resolve_device(device)
    if verify:
        if recipe is None or set(asked) - {"method"} or weights or report or report_dir or dry_run:
            raise UsageError(
                "--verify makes the merge of a recipe again, as it is",
                fix="give --recipe FILE --verify",
            )
        with progress(1, "verify") as bar:
            found = make_again(recipe, what, out, device=device, threads=threads, progress=bar)
        for line in found.lines():
            say(line)
        emit({"equal": True, "files": found.files, "versions": found.versions}, None, json)
        return
    if out is None and not dry_run:
        raise UsageError("no output is named", fix="give -o OUT, or --dry-run")
    if dry_run and (report or report_dir):
        raise UsageError(
            "--dry-run writes nothing, and --report writes", fix="leave one of them out"
        )
    if out is not None:
        check_is_new(out)
    with progress(1, "merge") as bar:
        plan = prepare(what, device=device, threads=threads, progress=bar)
        result = None if dry_run or out is None else plan.run(out, report_dir or report)
    tally = plan.survey() if result is None else result.tally
    for line in plan.lines(out, tally):
        say(line)
    document = plan.document(out, tally)
    if result is not None and result.adapter is not None:
        say(
            f"adapter holds {result.adapter.share:.1%} of the energy of the merged change at rank {result.adapter.rank}"
        )
        document["adapter"] = result.adapter.document()
    if result is not None and result.report is not None:
        say(f"report  {result.report / 'index.html'}")
        document["report"] = str(result.report)
    emit(document, None if dry_run else out, json)


def _recipe(
    path: Path | None,
    base: str | None,
    experts: list[str],
    weights: str | None,
    asked: dict[str, Any],
) -> Recipe:
    """Return the recipe of a file with what is asked beside it, or of base and experts."""
    from demerge.errors import UsageError
    from demerge.merging import Recipe
    from demerge.merging.recipe.coefficients import (
        check_order,
        is_coefficients,
        read_coefficients,
    )

    if (path is None) == (base is None):
        raise UsageError(
            "base and experts come from the command line or from --recipe",
            fix="merge BASE EXPERT... -o OUT",
        )
    if weights is not None and is_coefficients(weights):
        check_order(Path(weights), experts)
        whole, rules = read_coefficients(Path(weights))
        asked = {**asked, "weights": whole, "rules": [*asked.get("rules", ()), *rules]}
    elif weights is not None:
        asked = {**asked, "weights": _numbers(weights)}
    return (
        Recipe.read(path).changed(**asked)
        if path is not None
        else Recipe.of(base or "", experts, **asked)
    )


def _given(**asked: Any) -> dict[str, Any]:
    """Return what the command line says; the rest is left to the recipe."""
    return {name: value for name, value in asked.items() if value is not None}


def _numbers(text: str) -> list[float]:
    from demerge.errors import UsageError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        fix = "for example --weights 0.3,0.3, or a file that ends in .json, .yaml or .csv"
        raise UsageError(f"weights '{text}' are not numbers", fix=fix) from error


def _ranges(texts: list[str] | None) -> list[TimestepRange | None] | None:
    from demerge.timesteps import TimestepRange

    return (
        None
        if texts is None
        else [None if text == "none" else TimestepRange.parse(text) for text in texts]
    )


def _pairs(texts: list[str] | None) -> dict[str, str] | None:
    from demerge.errors import UsageError

    for text in texts or ():
        if "=" not in text:
            raise UsageError(
                f"option '{text}' has no value", fix="for example --option density=0.2"
            )
    pairs = (text.partition("=") for text in texts or ())
    return {name.strip().replace("-", "_"): value for name, _, value in pairs} or None
