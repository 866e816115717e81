"""The other parts of pipelines: text encoders, VAE and other parts with weights.

An expert whose parts equal the base's, up to rounding, changes nothing. One whose parts differ is
refused until `--components` says what to do: `denoiser` keeps the base's with a note, `all` merges
what differs by the same method, and a list names what is merged.
"""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from demerge.errors import InputError, UsageError
from demerge.lora import notes_of
from demerge.merging.inputs.compatibility import is_buffer
from demerge.merging.inputs.denoisers import Denoiser, Task
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.layout import (
    COMPONENTS,
    PART_NAME,
    SECOND,
    CheckpointLocation,
    locate,
    read_index,
)
from demerge.storage.safetensors_header import read_json
from demerge.timesteps import TimestepRange

DENOISER, ALL = "denoiser", "all"
DENOISERS = frozenset({DENOISER, *COMPONENTS, SECOND})
NOT_MERGED = frozenset({*COMPONENTS, SECOND, "safety_checker", "feature_extractor", "scheduler"})
WEIGHTS = (".safetensors", ".bin")
TORCH_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
WITHOUT_EFFECT = frozenset({
    "architectures", "dtype", "torch_dtype", "sample_size", "force_upcast", "use_cache",
    "initializer_range",
})  # fmt: skip


def find_component_tasks(
    base: CheckpointLocation,
    experts: Sequence[CheckpointLocation],
    ranges: Sequence[TimestepRange | None],
    components: str | None,
    variant: str | None = None,
) -> tuple[list[Task], list[str]]:
    """Return the other parts that are merged, and notes on what of the experts is not used.

    Args:
        ranges: of each expert, if they are known.
        components: None refuses differences; `denoiser`, `all`, or names separated by commas.

    Raises:
        UsageError: if a name is unknown, or the denoiser is not among them.
        InputError: if a part differs without `components`, or cannot be merged.
    """
    if base.component is None and components is not None:
        what = f"{base.path} is one file, whose tensors are all merged; --components is for folders"
        fix = "to merge the denoiser alone, give --only 'model.diffusion_model.**'"
        raise UsageError(what, fix=fix)
    wanted = _select_parts(components, list_parts(base))
    different = [_find_different(base, place, variant) for place in experts]
    tasks, notes = [], []
    for place, names in zip(experts, different, strict=True):
        left = [name for name in names if name not in wanted]
        if left and components in (None, ALL):
            _refuse(base, place, left, variant)
        if left:
            parts = f"its {_join(left)}, other than the base's"
            notes.append(f"{place.path}: not used, as --components says: {parts}")
    for name in wanted:
        if any(name in names for names in different):
            tasks.append(_make_task(name, base, experts, ranges, variant))
            for place in experts:
                if place.pipeline and name not in list_parts(place):
                    notes.append(f"{place.path} has no {name}: the base's is used")
    return tasks, notes


def note_ignored(base: object, experts: Sequence[object]) -> list[str]:
    """Return notes for commands that read denoisers alone: assumptions, other parts that differ."""
    notes = notes_of(experts)
    for expert in experts:
        if isinstance(base, Checkpoint) and isinstance(expert, Checkpoint):
            names = _find_different(base.place, expert.place, None)
            if names:
                parts = f"its {_join(names)}, other than the base's"
                notes.append(f"{expert.place.path}: not looked at: {parts}")
    return notes


def list_parts(place: CheckpointLocation) -> list[str]:
    """Return the names of a pipeline's parts with weights that are not denoisers."""
    folder = place.pipeline
    if folder is None or not (folder / "model_index.json").is_file():
        return []
    parts = []
    for name, entry in read_index(folder).items():
        is_set = isinstance(entry, list) and entry[-1:] != [None] and name not in NOT_MERGED
        if is_set and PART_NAME.fullmatch(name) and _list_weights(folder / name):
            parts.append(name)
    return parts


def _select_parts(components: str | None, names: Sequence[str]) -> list[str]:
    if components in (None, DENOISER):
        return []
    if components == ALL:
        return list(names)
    listed = [name.strip() for name in str(components).split(",")]
    for name in listed:
        if name not in names and name not in DENOISERS:
            fix = f"use {DENOISER}, {ALL}, or a list of {', '.join([DENOISER, *names])}"
            raise UsageError(f"--components: the base has no '{name}'", fix=fix)
    if not DENOISERS & set(listed):
        fix = f"give {','.join([DENOISER, *listed])}"
        raise UsageError("--components leaves the denoiser out", fix=fix)
    return [name for name in names if name in listed]


def _refuse(
    base: CheckpointLocation, expert: CheckpointLocation, names: Sequence[str], variant: str | None
) -> None:
    own = list_parts(base)
    reasons = []
    for name in names:
        why = "the base has none"
        if name in own:
            parts = [_locate_part(place, name, variant) for place in (base, expert)]
            why = _compare_parts(*parts)
        reasons += [f"{name}: {why}"] if why else []
    why = f" ({'; '.join(reasons)})" if reasons else ""
    fix = "give --components denoiser to keep the base's"
    fix += "" if reasons else ", or --components all to merge them too"
    what = f"{expert.path} has another {_join(names)} than {base.path}{why}"
    raise InputError(what, fix=fix)


def _make_task(
    name: str,
    base: CheckpointLocation,
    experts: Sequence[CheckpointLocation],
    ranges: Sequence[TimestepRange | None],
    variant: str | None,
) -> Task:
    own = _locate_part(base, name, variant)
    parts = []
    for i, place in enumerate(experts):
        if name not in list_parts(place):
            continue
        part = _locate_part(place, name, variant)
        differences = _compare_parts(own, part)
        if differences:
            what = f"{part.component}/config.json differs from the base's: {differences}"
            raise InputError(what, fix="give --components denoiser to keep the base's")
        parts.append((i, Denoiser(name, part, ranges[i])))
    file = TRANSFORMERS_FILE if own.files[0].name.startswith("model") else TORCH_FILE
    return Task(Path(name), Denoiser(name, own), parts, file=file, is_denoiser=False)


def _locate_part(place: CheckpointLocation, name: str, variant: str | None) -> CheckpointLocation:
    if place.pipeline is None:
        raise ValueError(f"{place.path} is not a pipeline")
    return locate(place.pipeline, variant, name)


def _find_different(
    base: CheckpointLocation, expert: CheckpointLocation, variant: str | None
) -> list[str]:
    """Return the names of an expert's parts that are not the base's."""
    if base.pipeline is None or expert.pipeline is None:
        return []
    if base.pipeline.resolve() == expert.pipeline.resolve():
        return []
    own = list_parts(base)
    different = []
    for name in list_parts(expert):
        if name not in own or not _is_equal(base.pipeline, expert.pipeline, name, variant):
            different.append(name)
    return different


def _is_equal(base: Path, expert: Path, name: str, variant: str | None) -> bool:
    one, other = base / name, expert / name
    files = {file.name: file for file in _list_weights(one)}
    others = {file.name: file for file in _list_weights(other)}
    if files.keys() == others.keys() and all(_same_bytes(files[n], others[n]) for n in files):
        return not _compare_configs(one, other)
    parts = [locate(pipeline, variant, name) for pipeline in (base, expert)]
    return not _compare_parts(*parts) and _equal_tensors(*map(Checkpoint, parts))


def _same_bytes(one: Path, other: Path) -> bool:
    return one.samefile(other) or filecmp.cmp(one, other, shallow=False)


def _equal_tensors(base: Checkpoint, expert: Checkpoint) -> bool:
    """Whether two parts have equal tensors, up to the narrower dtype's rounding and buffers."""
    expert = expert.named_like(base)
    names = [name for name in base if not is_buffer(name)]
    if set(names) != {name for name in expert if not is_buffer(name)}:
        return False
    for name in names:
        one, other = base[name], expert[name]
        if one.shape != other.shape:
            return False
        if not (torch.equal(one.to(other.dtype), other) or torch.equal(one, other.to(one.dtype))):
            return False
    return True


def _compare_parts(base: CheckpointLocation, expert: CheckpointLocation) -> str:
    return _compare_configs(base.component or base.path, expert.component or expert.path)


def _compare_configs(base: Path, expert: Path) -> str:
    """Say in which keys that both state two configs differ."""
    one, other = _read_config(base), _read_config(expert)
    differences = []
    for key in one:
        is_compared = key in other and key not in WITHOUT_EFFECT
        is_compared = is_compared and not key.startswith(("_", "transformers_version"))
        if is_compared and one[key] != other[key]:
            differences.append(f"{key} {other[key]!r} for {one[key]!r}"[:80])
    return ", ".join(differences)


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _list_weights(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    return [file for file in files if file.suffix in WEIGHTS]


def _join(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
