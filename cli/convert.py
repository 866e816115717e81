"""`demerge convert`: pickled weights to safetensors, single files to pipeline folders and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Json, emit

SOURCE = "A .bin, .ckpt or .pth file, a .safetensors file, or a pipeline folder."
OUT = "New .safetensors file; for a .safetensors file a new pipeline folder."
CONFIG = "For a folder: pipeline folder with the configs, scheduler and tokenizer it needs."
PICKLE = "Open the pickle, for its tensors alone. Pickles may run code."


def convert(
    source: Annotated[Path, typer.Argument(metavar="FILE", help=SOURCE)],
    out: Annotated[Path, typer.Argument(help=OUT)],
    config: Annotated[str | None, typer.Option(help=CONFIG)] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help=PICKLE)] = False,
    key: Annotated[str | None, typer.Option(help="Table that holds the weights.")] = None,
    json: Json = False,
) -> None:
    """Convert a pickle to safetensors, or a single file to a pipeline folder and back.

    demerge convert model.safetensors folder --config base-folder
    """
    from demerge.errors import UsageError
    from demerge.storage import pickles, single_file

    result: dict[str, object] = {"out": str(out)}
    if source.is_dir():
        result["tensors"] = single_file.to_file(source, out)
    elif source.suffix != ".safetensors":
        tensors = pickles.convert(source, out, allow_pickle=allow_pickle, key=key)
        result["tensors"] = len(tensors)
        result["parameters"] = sum(tensor.numel() for tensor in tensors.values())
    elif config is not None:
        result["tensors"] = single_file.to_folder(source, out, config)
    else:
        fix = f"demerge convert {source} {out.with_suffix('')} --config FOLDER"
        raise UsageError(f"{source} has no configs, which a folder needs", fix=fix)
    emit(result, out, json)
