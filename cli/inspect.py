"""`demerge inspect`: what a model is and whether it can be merged, from headers and configs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Json, emit


def inspect(
    model: Annotated[Path, typer.Argument(help="Pipeline folder, component folder, .safetensors file or shard index.")],
    json: Json = False,
) -> None:
    """Say what a model is and whether it can be merged; no weight is read."""
    from demerge.facts import facts_of

    facts = facts_of(model)
    emit(facts.document(), None, json)
    if not json:
        for name, value in facts.lines():
            print(f"{name:<16}{value}")
