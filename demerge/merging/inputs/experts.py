"""What lies around the weights of a merge's inputs: expert.json, configs, and the hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demerge.errors import InputError, UsageError
from demerge.expert import find_expert, find_expert_range
from demerge.lora import Adapter, NoBase
from demerge.merging.recipe.fields import Source
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.hashing import remembered_content
from demerge.storage.layout import CheckpointLocation
from demerge.storage.safetensors_header import read_json, read_scheduler
from demerge.timesteps import TimestepRange

Hashes = Mapping[Path, str]
Base = Checkpoint | NoBase
Expert = Checkpoint | Adapter
UNKNOWN = "a default of its class"
SCHEDULE: Mapping[str, Any] = {  # what the denoiser was trained on, with the default of diffusers; sampling has other keys
    "prediction_type": UNKNOWN, "num_train_timesteps": UNKNOWN, "beta_start": UNKNOWN, "beta_end": UNKNOWN,
    "beta_schedule": UNKNOWN, "trained_betas": None, "rescale_betas_zero_snr": False, "snr_shift_scale": UNKNOWN,
}  # fmt: skip
MEANING: Mapping[str, Any] = dict.fromkeys((  # of a denoiser: what changes its function and no shape
    "_class_name", "in_channels", "out_channels", "norm_eps", "norm_num_groups", "act_fn", "attention_head_dim",
    "num_attention_heads", "flip_sin_to_cos", "freq_shift", "mid_block_scale_factor", "center_input_sample",
    "resnet_time_scale_shift", "time_embedding_type", "downsample_padding", "add_attention", "addition_embed_type",
), UNKNOWN)  # fmt: skip
KINDS = {"config.json": "denoiser", "scheduler_config.json": "noise schedule"}


def range_of(place: CheckpointLocation, asked: Source) -> TimestepRange | None:
    """Return the timesteps an expert was trained on: what is asked for, or what its record says.

    Raises:
        UsageError: where the two disagree.
    """
    recorded = find_expert_range(place)
    if asked.range and recorded and asked.range != recorded:
        raise UsageError(
            f"{asked.path} was trained on {recorded} as its expert.json says, not on {asked.range}",
            fix="leave its range out, or name the expert of that range",
        )
    return asked.range or recorded


def check_unchanged(asked: Source, found: Source) -> None:
    """Refuse an input that is not the one whose SHA-256 the recipe names.

    Raises:
        InputError: naming the first file that differs.
    """
    paths = [(f"{found.path}: {name}", h, found.files.get(name)) for name, h in asked.files.items()]
    held = {path: h for files in found.inputs.values() for path, h in files.items()}
    paths += [
        (path, h, held.get(path))
        for files in asked.inputs.values()
        for path, h in files.items()
        if h
    ]
    for what, wanted, there in paths:
        if wanted != there:
            now = f"now {there[:16]}..." if there else "and it is not among the files used"
            raise InputError(
                f"{what} is not what the recipe names: SHA-256 {wanted[:16]}..., {now}",
                fix="bring the file back, or take the hashes (`files`, `inputs`) out of the recipe",
            )


def check_same_base(base: Base, experts: Sequence[Expert], no_base: bool = False) -> None:
    """Refuse experts that were made from another base, or from unlike ones if there is none, or predict something else.

    Args:
        no_base: the base is one of the models itself; which base they were made from does not matter.

    Raises:
        InputError: naming both.
    """
    alone = no_base and not isinstance(
        base, NoBase
    )  # the deltas of LoRA files are those of their base
    asked = [
        (e, record.base_sha256) for e in experts if not alone and (record := find_expert(e.place))
    ]
    if any(hash_ is not None for _, hash_ in asked):
        found = (
            next(h for _, h in asked if h) if isinstance(base, NoBase) else remembered_content(base)
        )
        for expert, hash_ in asked:
            if hash_ is not None and hash_ != found:
                raise InputError(
                    f"{expert.place.path} was finetuned from a base of sha256 {hash_[:16]}..., "
                    f"{base.place.path} has {found[:16]}...",
                    fix="name the base that this expert was finetuned from",
                )
    schedule = scheduler_config(base.place)
    for expert in experts:
        tables = {
            "config.json": (base.config or {}, expert.config or {}, MEANING),
            "scheduler_config.json": (schedule, scheduler_config(expert.place), SCHEDULE),
        }
        for file, (one, other, keys) in tables.items():
            differences = _differences(one, other, keys)
            if differences:
                raise InputError(
                    f"{expert.place.path} has another {KINDS[file]} than {base.place.path}: {differences}",
                    fix=f"name the base that it was finetuned from, or correct its {file} if that is wrong",
                )


def _differences(
    base: Mapping[str, Any], expert: Mapping[str, Any], keys: Mapping[str, Any]
) -> str:
    """Say in which keys two configs differ; a key that only one states has its default in the other, if that is known."""
    if not base or not expert:
        return ""
    pairs = {
        key: (base.get(key, default), expert.get(key, default)) for key, default in keys.items()
    }
    unlike = {
        key: pair
        for key, pair in pairs.items()
        if UNKNOWN not in pair and _plain(pair[0]) != _plain(pair[1])
    }
    return ", ".join(
        f"the {key.strip('_').replace('_', ' ')} {str(b)[:80]}, not {str(a)[:80]}"
        for key, (a, b) in unlike.items()
    )


def _plain(value: Any) -> Any:
    """Return a number for a list of equal ones."""
    return (
        value[0]
        if isinstance(value, list) and value and all(v == value[0] for v in value)
        else value
    )


def scheduler_config(place: CheckpointLocation) -> dict[str, Any]:
    """Return the scheduler's config, or nothing where there is none."""
    folder = place.pipeline
    places = [folder / "scheduler", folder] if folder else []
    path = next(
        (p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").is_file()),
        None,
    )
    return read_scheduler(path) if path is not None else {}


def source(
    asked: Source,
    opened: Sequence[Expert | NoBase],
    hashes: Hashes,
    inputs: Mapping[str, Checkpoint],
) -> Source:
    """Return the recipe's record of an input: what was asked for, with the hashes of what was found."""
    several = len({checkpoint.place.component for checkpoint in opened}) > 1
    files: dict[str, str] = {}
    for place in (checkpoint.place for checkpoint in opened):
        root = (place.pipeline if several else None) or place.component or place.path.parent
        files |= {file.relative_to(root).as_posix(): hashes[file] for file in place.files}
    tensors = {
        name: {str(file): hashes[file] for file in given.place.files}
        for name, given in inputs.items()
    }
    return Source(asked.path, asked.range, files, tensors)


def base_model(place: CheckpointLocation) -> str:
    """Return the base's Hub id where its files name one, else the name of its folder or file."""
    index = place.pipeline / "model_index.json" if place.pipeline else None
    recorded = read_json(index).get("_name_or_path") if index else None
    if (
        isinstance(recorded, str)
        and recorded.count("/") == 1
        and not recorded.startswith((".", "/"))
    ):
        return recorded
    return place.path.resolve().name
