"""One component of a pipeline folder, by an allowed stock class.

No remote code runs, and no weight is filled in at random. A part that is missing or foreign is an
error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from demerge.diffusion.configs import check_config
from demerge.errors import InputError, ResourceError
from demerge.storage.checkpoint import Checkpoint, modern
from demerge.storage.layout import component_place, inside, read_index
from demerge.storage.safetensors_header import read_json
from demerge.storage.schema import Foreign

MISFITS = (  # what a model's own parts raise on a config or an input that does not fit
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError,
    AssertionError,
)  # fmt: skip


def component_folder(folder: Path, name: str) -> Path:
    """Return the folder of a component; old pipelines of one model keep it in their own."""
    return folder / name if (folder / name).is_dir() else folder


def class_name(folder: str | Path, component: str) -> str:
    """Return the class of a component by model_index.json.

    Raises:
        InputError: if it names none.
    """
    match read_index(Path(folder)).get(component):
        case [_, str(name)]:
            return name
    what = f"{folder}/model_index.json: no component '{component}'"
    raise InputError(what, fix="use a pipeline with scheduler, and unet or transformer")


def find_class(folder: str | Path, component: str, supported: Collection[str]) -> str | None:
    """Return the class of a component; None if the pipeline has none.

    Raises:
        InputError: if the class is not one of `supported`.
    """
    if read_index(Path(folder)).get(component) in (None, [None, None]):
        return None
    name = class_name(folder, component)
    if name not in supported:
        what = f"{folder}: {component} is of class '{name}', which is not supported"
        raise InputError(what, fix=f"use a base with {' or '.join(supported)}")
    return name


def checked_folder(folder: str | Path, component: str) -> Path:
    """Return the folder of a component whose files are all inside the pipeline's."""
    folder = Path(folder)
    found = component_folder(folder, component)
    if found == folder and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no folder '{component}'", fix="fetch the whole pipeline")
    for file in [found, *found.iterdir()]:
        inside(folder, file)
    return found


def load_component(
    folder: str | Path, component: str, kind: type[Foreign], build: Callable[[dict[str, Any]], Any]
) -> Any:
    """Build a component without memory, compare it with its weights file, and only then load it."""
    model, weights, stored = _fit_component(folder, component, kind, build)
    state = model.state_dict()
    values = {}
    for name in state:
        tensor = weights[stored[_bare(name)]]
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        values[name] = tensor.to(dtype, copy=True)
    model.load_state_dict(values, assign=True)
    return model


def check_component(
    folder: str | Path, component: str, kind: type[Foreign], build: Callable[[dict[str, Any]], Any]
) -> None:
    """Build a component without memory and compare it with its weights file."""
    _fit_component(folder, component, kind, build)


def _fit_component(
    folder: str | Path, component: str, kind: type[Foreign], build: Callable[[dict[str, Any]], Any]
) -> tuple[Any, Checkpoint, dict[str, str]]:
    """Return a component without weights, its weights file, and the file's names by bare ones."""
    where = checked_folder(folder, component)
    weights = Checkpoint(component_place(where, projected=True))
    config = read_json(where / "config.json")
    check_config(config, kind, f"{where}/config.json", len(weights))
    with init_empty_weights(include_buffers=False):
        model = built(lambda: build(config), f"{where}/config.json")
    stored = {_bare(name): name for name in weights}
    for name, other in dict(getattr(model, "_tied_weights_keys", None) or {}).items():
        for one, twin in ((name, other), (other, name)):  # a file holds tied weights once
            if twin in stored:
                stored.setdefault(one, stored[twin])
    state = model.state_dict()
    shapes = {stored.get(_bare(name), name): tuple(state[name].shape) for name in state}
    _check_keys(weights, shapes, f"{where}: the weights do not fit the config")
    return model, weights, stored


def _check_keys(weights: Checkpoint, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Check names and shapes of weights; a `position_ids` of older files may be extra."""
    extra = [name for name in weights if not name.endswith("position_ids")]
    stored = {name: weights.specs[name].shape for name in shapes if name in weights}
    other = [f"{n} {list(s)} for {list(shapes[n])}" for n, s in stored.items() if s != shapes[n]]
    problems = {
        "missing": [name for name in shapes if name not in stored],
        "unknown": [name for name in extra if name not in shapes],
        "of another shape": other,
    }
    parts = [f"{len(n)} {kind}: {', '.join(n[:3])}" for kind, n in problems.items() if n]
    if parts:
        files = ", ".join(file.name for file in weights.place.files[:3])
        fix = "fetch weights and config of one model again"
        raise InputError(f"{what}: {files} has {'; '.join(parts)}", fix=fix)


def _bare(name: str) -> str:
    """Return the name of a tensor, whatever the version of the library that wrote it."""
    return modern(name).removeprefix("text_model.")


@contextmanager
def running(what: object) -> Iterator[None]:
    """Turn an error of a model's own parts into one that names the model.

    Raises:
        InputError: with the words of the library that it came from.
        ResourceError: if there is not enough memory; an accelerator's own error is passed on.
    """
    try:
        yield
    except MISFITS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = _reason(error)
        if "memory" in str(error):
            message = f"{what} needs more memory than this machine has: {reason}"
            raise ResourceError(message, fix="use a smaller batch") from error
        fix = "use the configs of this very model"
        raise InputError(f"{what} cannot be run: {reason}", fix=fix) from error


def built(make: Callable[[], Any], where: str) -> Any:
    """Return what a library builds from a foreign file; any error is the file's fault."""
    try:
        return make()
    except Exception as error:
        fix = "use the file of this very model"
        raise InputError(f"{where}: cannot be loaded: {_reason(error)}", fix=fix) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
