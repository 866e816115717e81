"""The files of the tensors that a method needs next to the weights, such as Fisher matrices.

A statistic weighs one expert on that expert's range. Its record may name another range, or a model
that is neither this expert nor the base; then it is refused. Without a record it is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demerge.errors import InputError
from demerge.merging.contract import Method
from demerge.merging.inputs.denoisers import Denoiser
from demerge.merging.recipe.source import Source
from demerge.provenance import Measured, measured_on
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.hashing import remembered_content
from demerge.timesteps import TimestepRange

SHOWN = 5
Tensors = Mapping[str, Any]


def find_inputs(
    method: Method,
    options: Mapping[str, str | Sequence[str]],
    sources: Sequence[Source],
    experts: Sequence[Denoiser],
) -> dict[str, list[Path]]:
    """Return the files that a method needs: of options, else of the recipe, else next to experts.

    Args:
        options: by NAME, paths, as a list or separated by commas. A folder stands for its
            NAME.safetensors. A single folder may also hold 0000-0250/NAME.safetensors for each
            expert's range.

    Raises:
        InputError: if a folder has no such file.
    """
    inputs = {}
    for name in method.inputs:
        if name in options:
            value = options[name]
            paths = [Path(text) for text in (value.split(",") if isinstance(value, str) else value)]
            ranges = [expert.range for expert in experts]
            inputs[name] = _find_files(f"{name}.safetensors", paths, ranges)
        elif all(name in source.inputs for source in sources):
            inputs[name] = [Path(path) for source in sources for path in source.inputs[name]]
        else:
            files = [expert.place.find_file(f"{name}.safetensors") for expert in experts]
            inputs[name] = [file for file in files if file is not None]
    return inputs


def _find_files(
    name: str, paths: Sequence[Path], ranges: Sequence[TimestepRange | None]
) -> list[Path]:
    if len(paths) == 1 and ranges and not (paths[0] / name).is_file():
        files = [paths[0] / str(span) / name for span in ranges]
        if all(file.is_file() for file in files):
            return files
    return [_find_inside(path, name) if path.is_dir() else path for path in paths]


def _find_inside(folder: Path, name: str) -> Path:
    if (folder / name).is_file():
        return folder / name
    below = [*sorted(folder.glob(f"*/{name}")), *sorted(folder.glob(f"*/*/{name}"))]
    fix = f"name one for each expert, in their order: {','.join(map(str, below[:SHOWN]))}"
    fix = fix if below else "name the files themselves"
    raise InputError(f"{folder} is a folder and has no {name}", fix=fix)


def check_measured_on(
    base: Tensors,
    experts: Sequence[Tensors],
    ranges: Sequence[TimestepRange | None],
    inputs: Mapping[str, Sequence[Tensors]],
    *,
    models: bool = True,
) -> None:
    """Refuse files whose record contradicts the expert that they are given for.

    Args:
        ranges: of each expert, None if it is not known.
        inputs: for each NAME one per expert; those that are not files are not looked at.
        models: whether base and experts are the weights that a record would name; a variant is not.

    Raises:
        InputError: naming the file, the expert, and how they differ.
    """
    base = base if models else {}
    for name, files in inputs.items():
        records = [measured_on(file) if isinstance(file, Checkpoint) else None for file in files]
        owners = list(zip(experts, ranges, strict=True))
        for i, (record, owner) in enumerate(zip(records, owners, strict=True)):
            what = _contradiction(record, base, *owner)
            if what:
                table = [[_contradiction(r, base, *each) for r in records] for each in owners]
                fix = _suggest_order(name, files, table) or _suggest_new(
                    name, files[i], owner[0], i
                )
                called = f"{name} {_label(files[i], i)} was measured {what}"
                raise InputError(f"{called}, and is given for {_label(owner[0], i)}", fix=fix)


def _contradiction(
    record: Measured | None, base: Tensors, expert: Tensors, span: TimestepRange | None
) -> str:
    """Return how a record contradicts an expert, empty if it does not."""
    if record is None:
        return ""
    if span is not None and record.span != span:
        return f"on {record.span}, not on {span}"
    if not (isinstance(base, Checkpoint) and isinstance(expert, Checkpoint)):
        return ""
    if record.model_sha256 in (remembered_content(base), remembered_content(expert)):
        return ""
    sha = record.model_sha256[:16]
    return f"at a model of sha256 {sha}..., which is neither this expert's nor the base's"


def _label(tensors: Tensors, i: int) -> str:
    place = getattr(tensors, "place", None)
    return f"expert {i}" if place is None else str(place.path)


def _suggest_order(name: str, files: Sequence[Tensors], table: Sequence[Sequence[str]]) -> str:
    """Return the option with the files in the experts' order, if any; table [expert file]."""
    order = [row.index("") for row in table if "" in row]
    if len(set(order)) != len(files):
        return ""
    paths = ",".join(_label(files[j], j) for j in order)
    return f"name them in the experts' order: --option {name}={paths}"


def _suggest_new(name: str, file: Tensors, expert: Tensors, i: int) -> str:
    place = getattr(expert, "place", None)
    command = f"demerge stats {_label(expert, i)} --data D --statistics {name}"
    if place is not None and place.find_file(f"{name}.safetensors") == Path(_label(file, i)):
        return f"remove it and make it again: {command}"
    return f"name that of this expert, which is made by {command}"
