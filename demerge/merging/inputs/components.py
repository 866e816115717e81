"""The other parts of pipelines: text encoders, VAE and other parts with weights.

An expert whose parts equal the base's, up to rounding, changes nothing. One whose parts differ is
refused until `--components` says what to do: `denoiser` keeps the base's with a note, `all` merges
what differs by the same method, and a list names what is merged.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Sequence
from pathlib import Path

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
KEEP = "give --components denoiser to keep the base's"
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
    differences = [_find_differences(base, place, variant) for place in experts]
    tasks, notes = [], []
    for place, found in zip(experts, differences, strict=True):
        left = {name: why for name, why in found.items() if name not in wanted}
        if left and components in (None, ALL):
            reasons = [f"{name}: {why}" for name, why in left.items() if why]
            why = f" ({'; '.join(reasons)})" if reasons else ""
            fix = "" if reasons else ", or --components all to merge them too"
            what = f"{place.path} has another {_join(left)} than {base.path}{why}"
            raise InputError(what, fix=f"{KEEP}{fix}")
        if left:
            other = f"its {_join(left)}, other than the base's"
            notes.append(f"{place.path}: not used, as --components says: {other}")
    for name in wanted:
        if not any(name in found for found in differences):
            continue
        own = locate(_pipeline(base), variant, name)
        parts = []
        for i, (place, found) in enumerate(zip(experts, differences, strict=True)):
            if name in list_parts(place):
                part = locate(_pipeline(place), variant, name)
                if found.get(name):
                    what = f"{part.component}/config.json differs from the base's: {found[name]}"
                    raise InputError(what, fix=KEEP)
                parts.append((i, Denoiser(name, part, ranges[i])))
            elif place.pipeline:
                notes.append(f"{place.path} has no {name}: the base's is used")
        file = TRANSFORMERS_FILE if own.files[0].name.startswith("model") else TORCH_FILE
        tasks.append(Task(Path(name), Denoiser(name, own), parts, file=file, is_denoiser=False))
    return tasks, notes


def note_ignored(base: object, experts: Sequence[object]) -> list[str]:
    """Return notes for commands that read denoisers alone: assumptions, other parts that differ."""
    notes = notes_of(experts)
    for expert in experts:
        if isinstance(base, Checkpoint) and isinstance(expert, Checkpoint):
            names = _find_differences(base.place, expert.place, None)
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


def _pipeline(place: CheckpointLocation) -> Path:
    if place.pipeline is None:
        raise ValueError(f"{place.path} is not a pipeline")
    return place.pipeline


def _find_differences(
    base: CheckpointLocation, expert: CheckpointLocation, variant: str | None
) -> dict[str, str]:
    """Return an expert's parts that are not the base's, and why they cannot be merged, if so."""
    if base.pipeline is None or expert.pipeline is None:
        return {}
    if base.pipeline.resolve() == expert.pipeline.resolve():
        return {}
    own, found = list_parts(base), {}
    for name in list_parts(expert):
        one, other = base.pipeline / name, expert.pipeline / name
        if name not in own:
            found[name] = "the base has none"
        elif differences := _compare_configs(one, other):
            found[name] = differences
        elif not _have_same_bytes(_list_weights(one), _list_weights(other)):
            parts = [locate(place, variant, name) for place in (base.pipeline, expert.pipeline)]
            if not _equal_tensors(*map(Checkpoint, parts)):
                found[name] = ""
    return found


def _have_same_bytes(ones: Sequence[Path], others: Sequence[Path]) -> bool:
    if [file.name for file in ones] != [file.name for file in others]:
        return False
    pairs = zip(ones, others, strict=True)
    return all(a.samefile(b) or filecmp.cmp(a, b, shallow=False) for a, b in pairs)


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


def _compare_configs(base: Path, expert: Path) -> str:
    """Say in which keys that both state two configs differ."""
    files = [folder / "config.json" for folder in (base, expert)]
    one, other = (read_json(file) if file.is_file() else {} for file in files)
    differences = []
    for key in one:
        is_compared = key in other and key not in WITHOUT_EFFECT
        is_compared = is_compared and not key.startswith(("_", "transformers_version"))
        if is_compared and one[key] != other[key]:
            differences.append(f"{key} {other[key]!r} for {one[key]!r}"[:80])
    return ", ".join(differences)


def _list_weights(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    return [file for file in files if file.suffix in WEIGHTS]


def _join(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
