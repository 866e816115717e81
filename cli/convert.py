"""`demerge convert`: pickled weights to safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Json, emit


def convert(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A .bin, .ckpt or .pth file of PyTorch.")],
    out: Annotated[Path, typer.Argument(help="A new .safetensors file.")],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open the pickle, for its tensors alone. Needed: pickles may run code.")
    ] = False,
    key: Annotated[str | None, typer.Option(help="Which table of the file holds the weights.")] = None,
    json: Json = False,
) -> None:
    """Write the tensors of a pickled checkpoint as safetensors; nothing else in it is opened."""
    from demerge.convert import convert as converted

    tensors = converted(source, out, allow_pickle=allow_pickle, key=key)
    emit({"out": str(out), "tensors": len(tensors), "parameters": sum(t.numel() for t in tensors.values())}, out, json)
