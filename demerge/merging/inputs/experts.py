"""What lies next to the weights of base and experts: expert.json, configs, hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from demerge.errors import InputError, UsageError
from demerge.expert import find_expert, find_expert_range
from demerge.lora import Adapter, NoBase
from demerge.merging.recipe.source import Source
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.hashing import remembered_content
from demerge.storage.layout import CheckpointLocation, read_pipeline_scheduler
from demerge.storage.safetensors_header import read_json
from demerge.timesteps import TimestepRange

BaseWeights = Checkpoint | NoBase
ExpertWeights = Checkpoint | Adapter
UNKNOWN = "a default of its class"
SCHEDULE: Mapping[str, Any] = {  # what training used, with diffusers' defaults
    "prediction_type": UNKNOWN, "num_train_timesteps": UNKNOWN, "beta_start": UNKNOWN,
    "beta_end": UNKNOWN, "beta_schedule": UNKNOWN, "trained_betas": None,
    "rescale_betas_zero_snr": False, "snr_shift_scale": UNKNOWN,
}  # fmt: skip
FUNCTION: Mapping[str, Any] = dict.fromkeys((  # what changes a denoiser's function but no shape
    "_class_name", "in_channels", "out_channels", "norm_eps", "norm_num_groups", "act_fn",
    "attention_head_dim", "num_attention_heads", "flip_sin_to_cos", "freq_shift",
    "mid_block_scale_factor", "center_input_sample", "resnet_time_scale_shift",
    "time_embedding_type", "downsample_padding", "add_attention", "addition_embed_type",
), UNKNOWN)  # fmt: skip


def resolve_range(place: CheckpointLocation, source: Source) -> TimestepRange | None:
    """Return the timesteps that an expert was trained on, by the recipe, record or metadata.

    Raises:
        UsageError: if the recipe and expert.json disagree.
    """
    expert = find_expert(place)
    if source.range and expert and source.range != expert.span:
        what = f"{source.path} was trained on {expert.span} as its expert.json says, not on"
        fix = "leave its range out, or name the expert of that range"
        raise UsageError(f"{what} {source.range}", fix=fix)
    return source.range or find_expert_range(place)


def check_same_base(
    base: BaseWeights, experts: Sequence[ExpertWeights], no_base: bool = False
) -> None:
    """Refuse experts of another base, and experts that predict something else.

    Args:
        no_base: the base is one of the models itself; their own base does not matter.
    """
    if isinstance(base, NoBase) or not no_base:  # deltas of LoRA files belong to one base
        _check_base_hashes(base, experts)
    schedule = find_scheduler_config(base.place)
    for expert in experts:
        theirs = find_scheduler_config(expert.place)
        for file, kind, differences in (
            ("config.json", "denoiser", _compare(base.config, expert.config, FUNCTION)),
            ("scheduler_config.json", "noise schedule", _compare(schedule, theirs, SCHEDULE)),
        ):
            if differences:
                what = f"{expert.place.path} has another {kind} than {base.place.path}"
                fix = "name the base that it was finetuned from, or correct its"
                raise InputError(f"{what}: {differences}", fix=f"{fix} {file} if that is wrong")


def _check_base_hashes(base: BaseWeights, experts: Sequence[ExpertWeights]) -> None:
    hashes = {}
    for expert in experts:
        record = find_expert(expert.place)
        if record is not None and record.base_sha256 is not None:
            hashes[expert.place.path] = record.base_sha256
    if not hashes:
        return
    first = next(iter(hashes.values()))
    own = first if isinstance(base, NoBase) else remembered_content(base)
    for path, sha in hashes.items():
        if sha != own:
            what = (
                f"{path} was finetuned from a base of sha256 {sha[:16]}..., {base.place.path} has"
            )
            fix = "name the base that this expert was finetuned from"
            raise InputError(f"{what} {own[:16]}...", fix=fix)


def _compare(
    base: Mapping[str, Any] | None, expert: Mapping[str, Any] | None, keys: Mapping[str, Any]
) -> str:
    """Say in which keys two configs differ; a key that one lacks has its default, if known."""
    differences = []
    for key, default in keys.items() if base and expert else ():
        mine, theirs = base.get(key, default), expert.get(key, default)  # type: ignore[union-attr]
        if UNKNOWN not in (mine, theirs) and _as_number(mine) != _as_number(theirs):
            name = key.strip("_").replace("_", " ")
            differences.append(f"the {name} {str(theirs)[:80]}, not {str(mine)[:80]}")
    return ", ".join(differences)


def _as_number(value: Any) -> Any:
    """Return a number for a list of equal ones."""
    is_constant = isinstance(value, list) and value and all(v == value[0] for v in value)
    return value[0] if is_constant else value


def find_scheduler_config(place: CheckpointLocation) -> dict[str, Any]:
    """Return the scheduler's config, empty if there is none."""
    return {} if place.pipeline is None else read_pipeline_scheduler(place.pipeline)


def record_source(
    source: Source,
    opened: Sequence[ExpertWeights | NoBase],
    hashes: Mapping[Path, str],
    inputs: Mapping[str, Checkpoint],
) -> Source:
    """Return an input of the recipe with the hashes of its files."""
    is_split = len({checkpoint.place.component for checkpoint in opened}) > 1
    files: dict[str, str] = {}
    for place in (checkpoint.place for checkpoint in opened):
        root = (place.pipeline if is_split else None) or place.component or place.path.parent
        files |= {file.relative_to(root).as_posix(): hashes[file] for file in place.files}
    tensors = {
        name: {str(file): hashes[file] for file in checkpoint.place.files}
        for name, checkpoint in inputs.items()
    }
    return replace(source, files=files, inputs=tensors)


def name_base(place: CheckpointLocation) -> str:
    """Return the base's Hub id if its files name one, else the name of its folder or file."""
    recorded = None
    if place.pipeline:
        recorded = read_json(place.pipeline / "model_index.json").get("_name_or_path")
    if isinstance(recorded, str) and recorded.count("/") == 1 and recorded[0] not in "./":
        return recorded
    return place.path.resolve().name
