"""`demerge inspect`: what a model is, from headers and configs alone, and what merges into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from demerge.cli.common import Json, emit, show
from demerge.merging.options import MergeInputs
from demerge.options import spec_of

DOES_NOT_MERGE = 3  # as the merge would end
MODEL = typer.Argument(help=spec_of(MergeInputs.__dataclass_fields__["base"]).help)
EXPERTS = typer.Argument(help="Models or LoRA files to merge into it.", show_default=False)


def inspect(
    model: Annotated[Path, MODEL],
    experts: Annotated[list[Path] | None, EXPERTS] = None,
    json: Json = False,
) -> None:
    """Show what a model is, or whether other models merge into it.

    If one does not, the reason and the fix are shown, and the exit code is 3.
    """
    from demerge.inspection import inspect_model

    if not experts:
        facts = inspect_model(model)
        emit(facts.document(), None, json)
        if not json:
            show(*(f"{name:<16}{value}" for name, value in facts.lines()))
        return
    inspect_model(model)
    checks = [_check(model, expert) for expert in experts]
    merges = all(check["merges"] for check in checks)
    emit({"base": str(model), "merges": merges, "experts": checks}, None, json)
    for check in [] if json else checks:
        verb = "merges into" if check["merges"] else "does not merge into"
        show(f"{check['path']}  {verb} {model}")
        notes = [("note", note) for note in check["notes"]]
        for name, value in [("why", check["why"]), ("fix", check["fix"]), *notes]:
            if value:
                show(f"  {name:<6}{value}")
    if not merges:
        raise typer.Exit(DOES_NOT_MERGE)


def _check(base: Path, expert: Path) -> dict[str, Any]:
    from demerge.errors import DemergeError
    from demerge.merging.planning import check_mergeable

    check = {"path": str(expert), "merges": True, "why": "", "fix": "", "notes": []}
    try:
        return check | {"notes": check_mergeable(base, [expert])}
    except DemergeError as error:
        return check | {"merges": False, "why": error.what, "fix": error.fix}
