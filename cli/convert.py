"""`demerge convert`: pickled weights to safetensors, single files to pipeline folders and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Json, emit


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A .bin, .ckpt or .pth file, a .safetensors file, or a pipeline folder.",
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="A new .safetensors file, or for one a new pipeline folder.")
    ],
    config: Annotated[
        str | None,
        typer.Option(
            help="For a folder: the pipeline folder whose configs, scheduler and tokenizer the file needs."
        ),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Open the pickle, for its tensors alone. Needed: pickles may run code.",
        ),
    ] = False,
    key: Annotated[
        str | None, typer.Option(help="Which table of the file holds the weights.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a pickle as safetensors, a single file as a pipeline folder, or a pipeline as a single file (LDM layout).

    demerge convert model.safetensors folder --config base-folder
    """
    from demerge.errors import UsageError
    from demerge.storage.pickles import convert as converted
    from demerge.storage.single_file import to_file, to_folder

    if source.is_dir():
        emit({"out": str(out), "tensors": to_file(source, out)}, out, json)
    elif source.suffix == ".safetensors":
        if config is None:
            fix = f"demerge convert {source} {out.with_suffix('')} --config FOLDER of a pipeline of the same kind"
            raise UsageError(f"{source} has no configs", fix=fix)
        emit({"out": str(out), "tensors": to_folder(source, out, config)}, out, json)
    else:
        tensors = converted(source, out, allow_pickle=allow_pickle, key=key)
        emit(
            {
                "out": str(out),
                "tensors": len(tensors),
                "parameters": sum(t.numel() for t in tensors.values()),
            },
            out,
            json,
        )
