"""What lies around the weights of a merge's inputs: expert.json, configs, and the hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demerge.errors import InputError, UsageError
from demerge.expert import expert_of, expert_range
from demerge.hashes import remembered_content
from demerge.headers import read_json
from demerge.lora import Adapter
from demerge.merge.recipe.asked import Source
from demerge.places import Place
from demerge.timesteps import TimestepRange
from demerge.weights import Checkpoint

Hashes = Mapping[Path, str]
Expert = Checkpoint | Adapter


def range_of(place: Place, asked: Source) -> TimestepRange | None:
    """Return the timesteps an expert was trained on: what is asked for, or what its record says.

    Raises:
        UsageError: where the two disagree.
    """
    recorded = expert_range(place)
    if asked.range and recorded and asked.range != recorded:
        raise UsageError(
            f"{asked.path} was trained on {recorded} as its expert.json says, not on {asked.range}",
            fix="leave its range out, or name the expert of that range",
        )
    return asked.range or recorded


def refuse_changed(asked: Source, found: Source) -> None:
    """Refuse an input that is not the one whose SHA-256 the recipe names.

    Raises:
        InputError: naming the first file that differs.
    """
    paths = [(f"{found.path}: {name}", h, found.files.get(name)) for name, h in asked.files.items()]
    held = {path: h for files in found.inputs.values() for path, h in files.items()}
    paths += [(path, h, held.get(path)) for files in asked.inputs.values() for path, h in files.items() if h]
    for what, wanted, there in paths:
        if wanted != there:
            now = f"now {there[:16]}..." if there else "and it is not among the files used"
            raise InputError(
                f"{what} is not what the recipe names: SHA-256 {wanted[:16]}..., {now}",
                fix="bring the file back, or take the hashes (`files`, `inputs`) out of the recipe",
            )


def refuse_foreign(base: Checkpoint, experts: Sequence[Expert]) -> None:
    """Refuse experts that were made from another base, or predict something else.

    Raises:
        InputError: naming both.
    """
    asked = [(e, record.base_sha256) for e in experts if (record := expert_of(e.place))]
    if any(hash_ is not None for _, hash_ in asked):
        found = remembered_content(base)
        for expert, hash_ in asked:
            if hash_ is not None and hash_ != found:
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


def denoiser_class(checkpoint: Expert) -> str | None:
    """Return the class name in the component's config."""
    name = (checkpoint.config or {}).get("_class_name")
    return name if isinstance(name, str) else None


def prediction_type(checkpoint: Expert) -> str | None:
    """Return what the pipeline's scheduler says the denoiser predicts."""
    value = scheduler_config(checkpoint.place).get("prediction_type")
    return value if isinstance(value, str) else None


def scheduler_config(place: Place) -> dict[str, Any]:
    """Return the scheduler's config, or nothing where there is none."""
    folder = place.pipeline
    places = [folder / "scheduler", folder] if folder else []
    path = next((p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").is_file()), None)
    return read_json(path) if path is not None else {}


def source(asked: Source, opened: Sequence[Expert], hashes: Hashes, inputs: Mapping[str, Checkpoint]) -> Source:
    """Return the recipe's record of an input: what was asked for, with the hashes of what was found."""
    several = len({checkpoint.place.component for checkpoint in opened}) > 1
    files: dict[str, str] = {}
    for place in (checkpoint.place for checkpoint in opened):
        root = (place.pipeline if several else None) or place.component or place.path.parent
        files |= {file.relative_to(root).as_posix(): hashes[file] for file in place.files}
    tensors = {name: {str(file): hashes[file] for file in given.place.files} for name, given in inputs.items()}
    return Source(asked.path, asked.range, files, tensors)


def base_model(place: Place) -> str:
    """Return the base's Hub id where its files name one, else the name of its folder or file."""
    index = place.pipeline / "model_index.json" if place.pipeline else None
    recorded = read_json(index).get("_name_or_path") if index else None
    if isinstance(recorded, str) and recorded.count("/") == 1 and not recorded.startswith((".", "/")):
        return recorded
    return place.path.resolve().name
