"""`demerge inspect`: what a model is, from headers and configs alone, and whether others merge into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from demerge.cli.common import Json, emit, show

DOES_NOT_MERGE = 3  # as the merge would end


def inspect(
    model: Annotated[
        Path,
        typer.Argument(help="Pipeline folder, component folder, .safetensors file or shard index."),
    ],
    experts: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Models that may be merged into it, or LoRA files of it.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Say what a model is, or, for a base and others, whether they merge into it and why not (exit code 3)."""
    from demerge.inspection import inspect_model

    facts = inspect_model(model)
    if not experts:
        emit(facts.document(), None, json)
        if not json:
            for name, value in facts.lines():
                show(f"{name:<16}{value}")
        return
    found = [_merges(model, expert) for expert in experts]
    emit(
        {"base": str(model), "merges": all(each["merges"] for each in found), "experts": found},
        None,
        json,
    )
    for each in [] if json else found:
        show(
            f"{each['path']}  {'merges into' if each['merges'] else 'does not merge into'} {model}"
        )
        lines = [
            ("why", each["why"]),
            ("fix", each["fix"]),
            *(("note", note) for note in each["notes"]),
        ]
        for name, value in lines:
            if value:
                show(f"  {name:<6}{value}")
    if not all(each["merges"] for each in found):
        raise typer.Exit(DOES_NOT_MERGE)


def _merges(base: Path, expert: Path) -> dict[str, Any]:
    from demerge.errors import DemergeError
    from demerge.merging.planning import check_mergeable

    found = {"path": str(expert), "merges": True, "why": "", "fix": "", "notes": []}
    try:
        return found | {"notes": check_mergeable(base, [expert])}
    except DemergeError as error:
        return found | {"merges": False, "why": error.what, "fix": error.fix}
