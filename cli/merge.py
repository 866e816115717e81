"""`demerge merge`: a base and its experts into one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Json, Seed, emit, progress, say


def merge(
    base: Annotated[Path, typer.Argument(help="Pipeline folder, component folder, .safetensors file or shard index.")],
    experts: Annotated[list[Path], typer.Argument(metavar="EXPERT...", help="Models finetuned from the base.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="A new folder, or a new .safetensors file.")] = None,
    method: Annotated[str, typer.Option(help="A name from `demerge methods`, or path.py:function.")] = "task_arithmetic",
    weights: Annotated[str | None, typer.Option(help="One number per expert, comma-separated; 1/K each by default.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", help="NAME=VALUE of the method; may be repeated.")] = None,
    save_dtype: Annotated[str, typer.Option("--save-dtype", help="keep, float32, float16 or bfloat16.")] = "keep",
    seed: Seed = 0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check, measure what survives the rounding, print the plan, write nothing."),
    ] = False,
    json: Json = False,
) -> None:
    """Merge experts into one model of the base's architecture.

    A pipeline folder in gives a pipeline folder out, which loads with stock diffusers and holds the recipe.
    """
    from demerge.errors import UsageError
    from demerge.files import refuse_existing
    from demerge.merge import prepare

    if out is None and not dry_run:
        raise UsageError("no output is named", fix="give -o OUT, or --dry-run")
    if out is not None:
        refuse_existing(out)
    with progress(1, "merge") as bar:
        plan = prepare(
            base,
            experts,
            method=method,
            weights=_numbers(weights),
            options=_pairs(option or []),
            seed=seed,
            save_dtype=save_dtype,
            progress=bar,
        )
        tally = plan.survey() if dry_run or out is None else plan.run(out).tally
    for line in plan.lines(out, tally):
        say(line)
    emit(plan.document(out, tally), None if dry_run else out, json)


def _numbers(text: str | None) -> list[float] | None:
    from demerge.errors import UsageError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"weights '{text}' are not numbers", fix="for example --weights 0.3,0.3") from error


def _pairs(texts: list[str]) -> dict[str, str]:
    from demerge.errors import UsageError

    for text in texts:
        if "=" not in text:
            raise UsageError(f"option '{text}' has no value", fix="for example --option density=0.2")
    return {name.strip().replace("-", "_"): value for name, _, value in (text.partition("=") for text in texts)}
