"""What lies around the weights of a merge's inputs: expert.json, configs, tensors a method needs, and the hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from demerge.errors import InputError, UsageError
from demerge.files import sha256
from demerge.headers import read_json
from demerge.merge.recipe import Source
from demerge.merge.registry import Method
from demerge.places import Place
from demerge.timesteps import TimestepRange
from demerge.weights import Checkpoint, content_sha256

Hashes = Mapping[Path, str]


def expert_range(place: Place) -> TimestepRange | None:
    """Return the range that an expert's record names, or None where it has no record.

    Raises:
        InputError: where the record is damaged.
    """
    record = place.beside("expert.json")
    if record is None:
        return None
    try:
        start, stop = read_json(record)["range"]
        return TimestepRange(int(start), int(stop))
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise InputError(f"{record}: no range [start, stop] in it", fix="use the expert.json that finetune wrote") from error


def refuse_foreign(base: Checkpoint, experts: Sequence[Checkpoint]) -> None:
    """Refuse experts that were made from another base, or predict something else.

    Raises:
        InputError: naming both.
    """
    asked = [(e, read_json(record).get("base_sha256")) for e in experts if (record := e.place.beside("expert.json"))]
    if any(isinstance(hash_, str) for _, hash_ in asked):
        found = content_sha256(base)
        for expert, hash_ in asked:
            if isinstance(hash_, str) and hash_ != found:
                raise InputError(
                    f"{expert.place.path} was finetuned from a base of sha256 {hash_[:16]}..., "
                    f"{base.place.path} has {found[:16]}...",
                    fix="name the base that this expert was finetuned from",
                )
    for what, of in (("class", denoiser_class), ("prediction type", prediction_type)):
        for expert in experts:
            one, other = of(base), of(expert)
            if one and other and one != other:
                raise InputError(
                    f"{expert.place.path} has the {what} {other}, {base.place.path} has {one}",
                    fix="merge models finetuned from this base",
                )


def denoiser_class(checkpoint: Checkpoint) -> str | None:
    """Return the class name in the component's config."""
    name = (checkpoint.config or {}).get("_class_name")
    return name if isinstance(name, str) else None


def prediction_type(checkpoint: Checkpoint) -> str | None:
    """Return what the pipeline's scheduler says the denoiser predicts."""
    value = scheduler_config(checkpoint.place).get("prediction_type")
    return value if isinstance(value, str) else None


def scheduler_config(place: Place) -> dict[str, Any]:
    """Return the scheduler's config, or nothing where there is none."""
    folder = place.pipeline
    places = [folder / "scheduler", folder] if folder else []
    path = next((p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").is_file()), None)
    return read_json(path) if path is not None else {}


def input_paths(method: Method, options: dict[str, Any], experts: Sequence[Place]) -> dict[str, list[Path]]:
    """Take the paths NAME=PATH,PATH out of the options, or find NAME.safetensors beside each expert."""
    found = {}
    for name in method.inputs:
        given = options.pop(name, None)
        if given is None:
            found[name] = [p for place in experts if (p := place.beside(f"{name}.safetensors"))]
        else:
            texts = given.split(",") if isinstance(given, str) else given
            found[name] = [Path(text) for text in texts]
    return found


def hash_files(checkpoints: Sequence[Checkpoint]) -> Hashes:
    """Return the SHA-256 of every file, computed side by side."""
    files = list(dict.fromkeys(file for checkpoint in checkpoints for file in checkpoint.place.files))
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(sha256, files), strict=True))


def source(path: str, checkpoint: Checkpoint, hashes: Hashes, inputs: Mapping[str, Checkpoint]) -> Source:
    """Return the recipe's record of an input that was named `path`."""
    place = checkpoint.place
    root = place.component or place.path.parent
    files = {file.relative_to(root).as_posix(): hashes[file] for file in place.files}
    tensors = {name: {str(c.place.path): hashes[c.place.path]} for name, c in inputs.items()}
    return Source(path, files, expert_range(place), tensors or None)


def base_model(place: Place) -> str:
    """Return the base's Hub id where its files name one, else the name of its folder or file."""
    index = place.pipeline / "model_index.json" if place.pipeline else None
    recorded = read_json(index).get("_name_or_path") if index else None
    if isinstance(recorded, str) and recorded.count("/") == 1 and not recorded.startswith((".", "/")):
        return recorded
    return place.path.resolve().name
