"""What lies next to the denoiser in the pipelines of a merge: text encoders, VAE and other parts with weights.

An expert whose parts are the base's, but for rounding, changes nothing. One whose parts differ is refused until it is said what
becomes of them: `denoiser` keeps the base's with a note, `all` merges what differs by the same method, a list does both.
"""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
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
NOT_MERGED = frozenset({*COMPONENTS, SECOND, "safety_checker", "feature_extractor", "scheduler"})
WEIGHTS = (".safetensors", ".bin")
TORCH_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
SILENT = frozenset(
    {
        "architectures",
        "dtype",
        "torch_dtype",
        "sample_size",
        "force_upcast",
        "use_cache",
        "initializer_range",
    }
)


def component_tasks(
    base: CheckpointLocation,
    experts: Sequence[CheckpointLocation],
    ranges: Sequence[TimestepRange | None],
    asked: str | None,
    variant: str | None = None,
) -> tuple[list[Task], list[str]]:
    """Return what is merged next to the denoisers, and notes of what of the experts is not used.

    Args:
        ranges: of each expert, if they are known.
        asked: None to refuse differences, `denoiser`, `all`, or names separated by commas.

    Raises:
        UsageError: if a name is unknown, or the denoiser is not among them.
        InputError: if a part differs and nothing is asked, or cannot be merged.
    """
    if base.component is None and asked is not None:
        what = f"{base.path} is one file, whose tensors are all merged; --components is for pipeline folders"
        raise UsageError(
            what, fix="to merge the denoiser alone, give --only 'model.diffusion_model.**'"
        )
    names = parts_of(base)
    wanted = _wanted(asked, names)
    found = [_differing(base, place, variant) for place in experts]
    tasks, notes = [], []
    for place, unlike in zip(experts, found, strict=True):
        left = [name for name in unlike if name not in wanted]
        if left and asked in (None, ALL):
            _refuse(base, place, left, variant)
        if left:
            notes.append(
                f"{place.path}: not used, as --components says: its {_and(left)}, other than the base's"
            )
    for name in wanted:
        if any(name in unlike for unlike in found):
            tasks.append(_task(name, base, experts, ranges, variant))
            lacking = [
                str(place.path)
                for place in experts
                if place.pipeline and name not in parts_of(place)
            ]
            notes += [f"{path} has no {name}: the base's is taken" for path in lacking]
    return tasks, notes


def notes_about(base: object, experts: Sequence[object]) -> list[str]:
    """Return what is supposed or passed over if only denoisers are read: settings of LoRA files, other parts that differ."""
    notes = notes_of(experts)
    for expert in experts:
        if isinstance(base, Checkpoint) and isinstance(expert, Checkpoint):
            unlike = _differing(base.place, expert.place, None)
            if unlike:
                notes.append(
                    f"{expert.place.path}: not looked at: its {_and(unlike)}, other than the base's"
                )
    return notes


def parts_of(place: CheckpointLocation) -> list[str]:
    """Return the names of a pipeline's parts with weights that are no denoiser."""
    folder = place.pipeline
    index = read_index(folder) if folder and (folder / "model_index.json").is_file() else {}
    held = [
        n
        for n, entry in index.items()
        if isinstance(entry, list) and entry[-1:] != [None] and n not in NOT_MERGED
    ]
    return [
        name for name in held if folder and PART_NAME.fullmatch(name) and _weights(folder / name)
    ]


def _wanted(asked: str | None, names: Sequence[str]) -> list[str]:
    if asked in (None, DENOISER):
        return []
    if asked == ALL:
        return list(names)
    given = [name.strip() for name in str(asked).split(",")]
    denoisers = {DENOISER, *COMPONENTS, SECOND}
    unknown = [name for name in given if name not in names and name not in denoisers]
    if unknown:
        fix = f"use {DENOISER}, {ALL}, or a list of {', '.join([DENOISER, *names])}"
        raise UsageError(f"--components: the base has no '{unknown[0]}'", fix=fix)
    if not denoisers & set(given):
        raise UsageError(
            "--components leaves the denoiser out", fix=f"give {','.join([DENOISER, *given])}"
        )
    return [name for name in names if name in given]


def _refuse(
    base: CheckpointLocation, expert: CheckpointLocation, names: Sequence[str], variant: str | None
) -> None:
    mine = parts_of(base)
    unlike = {
        n: _config_differences(*_pair(base, expert, n, variant))
        if n in mine
        else "the base has none"
        for n in names
    }
    reasons = "; ".join(f"{name}: {why}" for name, why in unlike.items() if why)
    what = f"{expert.path} has another {_and(names)} than {base.path}{f' ({reasons})' if reasons else ''}"
    fix = "give --components denoiser to keep the base's" + (
        "" if reasons else ", or --components all to merge them too"
    )
    raise InputError(what, fix=fix)


def _task(
    name: str,
    base: CheckpointLocation,
    experts: Sequence[CheckpointLocation],
    ranges: Sequence[TimestepRange | None],
    variant: str | None,
) -> Task:
    mine = _component(base, name, variant)
    held = [
        (i, place) for i, place in enumerate(experts) if place.pipeline and name in parts_of(place)
    ]
    places = [(i, _component(place, name, variant)) for i, place in held]
    for _, place in places:
        differences = _config_differences(mine, place)
        if differences:
            what = f"{place.component}/config.json differs from the base's: {differences}"
            raise InputError(what, fix="give --components denoiser to keep the base's")
    file = TRANSFORMERS_FILE if mine.files[0].name.startswith("model") else TORCH_FILE
    its = [(i, Denoiser(name, place, ranges[i])) for i, place in places]
    return Task(Path(name), Denoiser(name, mine), its, file=file, is_denoiser=False)


def _component(place: CheckpointLocation, name: str, variant: str | None) -> CheckpointLocation:
    if place.pipeline is None:
        raise ValueError(f"{place.path} is not a pipeline")
    return locate(place.pipeline, variant, name)


def _pair(
    base: CheckpointLocation, expert: CheckpointLocation, name: str, variant: str | None
) -> tuple[CheckpointLocation, CheckpointLocation]:
    return _component(base, name, variant), _component(expert, name, variant)


def _differing(
    base: CheckpointLocation, expert: CheckpointLocation, variant: str | None
) -> list[str]:
    """Return the names of an expert's parts that are not the base's."""
    if (
        base.pipeline is None
        or expert.pipeline is None
        or base.pipeline.resolve() == expert.pipeline.resolve()
    ):
        return []
    mine = parts_of(base)
    return [
        name
        for name in parts_of(expert)
        if name not in mine or not _equal(base, expert, name, variant)
    ]


def _equal(
    base: CheckpointLocation, expert: CheckpointLocation, name: str, variant: str | None
) -> bool:
    folders = [place.pipeline / name for place in (base, expert) if place.pipeline]
    files = [{file.name: file for file in _weights(folder)} for folder in folders]
    if files[0].keys() == files[1].keys() and all(
        _same_bytes(files[0][n], files[1][n]) for n in files[0]
    ):
        return not _differences(*(_config(folder) for folder in folders))
    one, other = _pair(base, expert, name, variant)
    return not _config_differences(one, other) and _equal_tensors(
        Checkpoint(one), Checkpoint(other)
    )


def _same_bytes(one: Path, other: Path) -> bool:
    return one.samefile(other) or filecmp.cmp(one, other, shallow=False)


def _equal_tensors(base: Checkpoint, expert: Checkpoint) -> bool:
    """Whether two parts have equal tensors, but for rounding to the narrower dtype and buffers."""
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


def _config_differences(base: CheckpointLocation, expert: CheckpointLocation) -> str:
    folders = [place.component for place in (base, expert) if place.component]
    return _differences(*(_config(folder) for folder in folders))


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _differences(base: Mapping[str, Any], expert: Mapping[str, Any]) -> str:
    """Say in which keys that both have two configs differ; what only one states may be the other's default."""
    keys = [
        key
        for key in base
        if key in expert and key not in SILENT and not key.startswith(("_", "transformers_version"))
    ]
    return ", ".join(
        f"{key} {expert[key]!r} for {base[key]!r}"[:80] for key in keys if base[key] != expert[key]
    )


def _weights(folder: Path) -> list[Path]:
    return (
        [file for file in sorted(folder.glob("*")) if file.suffix in WEIGHTS]
        if folder.is_dir()
        else []
    )


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
