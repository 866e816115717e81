"""The tensors that a method needs beside the weights, as Fisher and Gram matrices: where they lie, and whose they are.

A statistic weighs one expert on that expert's range. One that says of itself that it was measured on another range, or at a
model that is neither this expert nor the base, is refused; one without a record is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demerge.errors import InputError
from demerge.merging.contract import Method
from demerge.merging.inputs.denoisers import Denoiser
from demerge.merging.recipe.fields import Source
from demerge.provenance import Measured, measured_on
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.hashing import remembered_content
from demerge.timesteps import TimestepRange

SHOWN = 5


def input_paths(
    method: Method,
    given: Mapping[str, str | Sequence[str]],
    asked: Sequence[Source],
    experts: Sequence[Denoiser],
) -> dict[str, list[Path]]:
    """Return the files of tensors that a method needs: those given, else those the recipe names, else those beside experts.

    Args:
        given: by the tensors' NAME, paths, separated by commas where they are one text. A folder stands for its
            NAME.safetensors, or, where it is the only path, for the 0000-0250/NAME.safetensors of each expert's range.

    Raises:
        InputError: where a folder has no such file.
    """
    found = {}
    for name in method.inputs:
        if name in given:
            paths = given[name]
            texts = paths.split(",") if isinstance(paths, str) else paths
            found[name] = _named(
                f"{name}.safetensors",
                [Path(text) for text in texts],
                [expert.range for expert in experts],
            )
        elif all(name in source.inputs for source in asked):
            found[name] = [Path(path) for source in asked for path in source.inputs[name]]
        else:
            found[name] = [
                p for expert in experts if (p := expert.place.beside(f"{name}.safetensors"))
            ]
    return found


def _named(file: str, paths: Sequence[Path], ranges: Sequence[TimestepRange | None]) -> list[Path]:
    of_ranges = [paths[0] / str(span) / file for span in ranges] if len(paths) == 1 else []
    if of_ranges and not (paths[0] / file).is_file() and all(path.is_file() for path in of_ranges):
        return of_ranges
    return [_inside(path, file) if path.is_dir() else path for path in paths]


def _inside(folder: Path, file: str) -> Path:
    if (folder / file).is_file():
        return folder / file
    below = [str(path) for depth in ("*", "*/*") for path in sorted(folder.glob(f"{depth}/{file}"))]
    which = (
        f"name one for each expert, in their order: {','.join(below[:SHOWN])}"
        if below
        else "name the files themselves"
    )
    raise InputError(f"{folder} is a folder and has no {file}", fix=which)


# -- whose they are ------------------------------------------------------------------------------------------------------


def check_measured_on(
    base: Mapping[str, Any],
    experts: Sequence[Mapping[str, Any]],
    ranges: Sequence[TimestepRange | None],
    inputs: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    models: bool = True,
) -> None:
    """Refuse files whose record contradicts the expert that they are given for.

    Args:
        ranges: of each expert, None where it is not known.
        inputs: for each NAME one for each expert; those that are no files are not looked at.
        models: whether base and experts are the very weights that a record would name; not so for a variant of them.

    Raises:
        InputError: naming the file and the expert, and how the record and the expert differ.
    """
    for name, files in inputs.items():
        records = [measured_on(file) if isinstance(file, Checkpoint) else None for file in files]
        owners = list(zip(experts, ranges, strict=True))
        for i, (record, (expert, span)) in enumerate(zip(records, owners, strict=True)):
            what = _contradiction(record, base, expert, span, models)
            if what:
                found = [
                    [_contradiction(each, base, *owner, models) for each in records]
                    for owner in owners
                ]
                raise InputError(
                    f"{name} {_called(files[i], i)} was measured {what}, and is given for {_called(expert, i)}",
                    fix=_order(name, files, found) or _another(name, files[i], expert, i),
                )


def _contradiction(
    record: Measured | None,
    base: Mapping[str, Any],
    expert: Mapping[str, Any],
    span: TimestepRange | None,
    models: bool,
) -> str:
    """Return how a record contradicts an expert, empty where it does not."""
    if record is None:
        return ""
    if span is not None and record.span != span:
        return f"on {record.span}, not on {span}"
    if not (models and isinstance(base, Checkpoint) and isinstance(expert, Checkpoint)):
        return ""
    if record.model_sha256 == remembered_content(base) or record.model_sha256 == remembered_content(
        expert
    ):
        return ""
    return f"at a model of sha256 {record.model_sha256[:16]}..., which is neither this expert's nor the base's"


def _called(tensors: Mapping[str, Any], i: int) -> str:
    place = getattr(tensors, "place", None)
    return f"expert {i}" if place is None else str(place.path)


def _order(name: str, files: Sequence[Mapping[str, Any]], found: Sequence[Sequence[str]]) -> str:
    """Return the option that names the files in the order of the experts, where there is one; found: [expert file]."""
    order = [row.index("") for row in found if "" in row]
    paths = [_called(files[j], j) for j in order]
    return (
        f"name them in the experts' order: --option {name}={','.join(paths)}"
        if len(set(order)) == len(files)
        else ""
    )


def _another(name: str, file: Mapping[str, Any], expert: Mapping[str, Any], i: int) -> str:
    place, make = (
        getattr(expert, "place", None),
        f"demerge stats {_called(expert, i)} --data D --statistics {name}",
    )
    if place is not None and place.beside(f"{name}.safetensors") == Path(_called(file, i)):
        return f"remove it and make it again: {make}"
    return f"name that of this expert, which is made by {make}"
