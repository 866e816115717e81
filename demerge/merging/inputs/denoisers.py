"""Pipelines of two denoisers (Wan 2.2): which experts each denoiser of the output is merged from.

    transformer    the timesteps t >= b T, high noise          transformer_2    t < b T, low noise

with b the `boundary_ratio` of model_index.json and T the scheduler's `num_train_timesteps`. Such a pipeline is two experts,
of the ranges [ceil(b T), T) and [0, ceil(b T)), for a base of one denoiser. With a base of two, an expert goes to the side
that its range reaches into: each of two to its counterpart. A base of one denoiser gives a pipeline of two where a boundary
is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demerge.errors import InputError, UsageError
from demerge.merging.inputs.experts import scheduler_config
from demerge.storage.layout import SECOND, CheckpointLocation, locate, read_index
from demerge.timesteps import TimestepRange

FIRST = "transformer"
TWO = (
    "WanPipeline",
    "WanImageToVideoPipeline",
    "WanVACEPipeline",
)  # the pipelines of diffusers that take a second one
STEPS = 1000  # num_train_timesteps where the scheduler does not say it, as in diffusers


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A denoiser of a model that was named as base or expert.

    Attributes:
        name: the name of its folder, empty for a file.
        range: the timesteps that its pipeline uses it for, None where it is the only one.
    """

    name: str
    place: CheckpointLocation
    range: TimestepRange | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One denoiser of the output, or another part that is merged.

    Attributes:
        folder: where it lies in the output folder.
        file: the name of its weights there.
        is_denoiser: false for a text encoder, a VAE and the like.
        base: what it is merged into.
        experts: (number of the expert as it was named, the denoiser of it that is taken).
        range: the timesteps that the output uses it for, None where it is the only one.
    """

    folder: Path
    base: Denoiser
    experts: Sequence[tuple[int, Denoiser]]
    range: TimestepRange | None = None
    file: str = "diffusion_pytorch_model.safetensors"
    is_denoiser: bool = True


def denoisers(place: CheckpointLocation, variant: str | None = None) -> list[Denoiser]:
    """Return the denoisers of a model, high noise first: two for a pipeline with a boundary, else one.

    A component folder inside such a pipeline is one of them, with its range.

    Raises:
        InputError: where the pipeline's boundary is missing or no number between 0 and 1, or its second denoiser is damaged.
    """
    name = "" if place.component is None else place.component.resolve().name
    folder = place.pipeline or (
        place.component.resolve().parent if place.component and name in (FIRST, SECOND) else None
    )
    spans = (
        None
        if folder is None or name not in (FIRST, SECOND)
        else _spans(replace(place, pipeline=folder))
    )
    if folder is None or spans is None:
        return [Denoiser(name, place)]
    first = Denoiser(name, place, spans[name])
    return (
        [first]
        if place.pipeline is None
        else [first, Denoiser(SECOND, locate(folder, variant, SECOND), spans[SECOND])]
    )


def tasks(
    base: Sequence[Denoiser],
    experts: Sequence[Sequence[Denoiser]],
    ranges: Sequence[TimestepRange | None],
    boundary: float | None = None,
) -> list[Task]:
    """Return the denoisers of the output, high noise first, each with its experts.

    Args:
        base: of `denoisers`.
        experts: of `denoisers`, for each expert as it was named.
        ranges: of each expert as it was named, by an option or its record; a pipeline of two has its own.
        boundary: b, for a base of one denoiser whose output is to have two.

    Raises:
        UsageError: where it is not known, or not possible, which denoiser an expert belongs to.
    """
    known = [
        [replace(d, range=d.range or span) for d in found]
        for found, span in zip(experts, ranges, strict=True)
    ]
    if len(base) == 1 and boundary is None:
        only = base[0]
        return [
            Task(
                _folder(only),
                only,
                _counterparts(only, known),
                only.range if only.place.pipeline else None,
            )
        ]
    if len(base) == 2:
        if boundary is not None:
            raise UsageError(
                f"{base[0].place.path} has two denoisers already", fix="leave --boundary out"
            )
        sides = [(_folder(side), side, side.range) for side in base]
    else:
        cut = split(boundary or 0.0, _steps(base[0].place))
        sides = [(Path(name), base[0], cut[name]) for name in (FIRST, SECOND)]
    _check_all_placed(known, [span for _, _, span in sides if span])
    found = [Task(folder, side, _reaching(span, known), span) for folder, side, span in sides]
    bare = next((task for task in found if not task.experts), None)
    if boundary is not None and bare is not None:
        raise UsageError(
            f"no expert reaches into {bare.range}, and {bare.folder} would be the base",
            fix="name one",
        )
    return found


def split(boundary: float, T: int) -> dict[str, TimestepRange]:
    """Return the ranges of the two denoisers, as diffusers cuts them: t >= b T is the first one's.

    Raises:
        UsageError: where one would have no timestep.
    """
    cut = math.ceil(boundary * T)
    if not 0 < cut < T:
        raise UsageError(
            f"boundary {boundary} leaves a denoiser without timesteps",
            fix="give a number between 0 and 1",
        )
    return {FIRST: TimestepRange(cut, T), SECOND: TimestepRange(0, cut)}


def index_of_two(base: CheckpointLocation, boundary: float) -> dict[str, Any]:
    """Return the model_index.json of a pipeline of two denoisers that is made out of a base of one.

    Raises:
        UsageError: where the base is no pipeline whose class takes two.
    """
    index = read_index(base.pipeline) if base.pipeline else {}
    kind = index.get("_class_name")
    if kind not in TWO or FIRST not in index:
        raise UsageError(
            f"{base.path} is {f'a {kind}' if kind else 'no pipeline'}: stock diffusers gives it one denoiser, --boundary two",
            fix=f"use a pipeline folder of class {', '.join(TWO)}",
        )
    return {**index, SECOND: index[FIRST], "boundary_ratio": boundary}


def _spans(place: CheckpointLocation) -> Mapping[str, TimestepRange] | None:
    """Return the ranges of a pipeline's two denoisers, None where it has one."""
    folder = place.pipeline
    if (
        folder is None
        or not (folder / "model_index.json").is_file()
        or not (folder / SECOND).is_dir()
    ):
        return None
    index = read_index(folder)
    if not isinstance(index.get(SECOND), list) or None in index[SECOND]:
        return None
    ratio = index.get("boundary_ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        what = f"{folder}/model_index.json: two denoisers and the boundary_ratio {ratio!r}"
        raise InputError(
            what, fix="write the number between 0 and 1 that the pipeline was made with"
        )
    return split(ratio, _steps(place))


def _steps(place: CheckpointLocation) -> int:
    T = scheduler_config(place).get("num_train_timesteps", STEPS)
    if not isinstance(T, int) or not 1 < T < 1 << 20:
        raise InputError(
            f"{place.path}: num_train_timesteps is {T!r}",
            fix="use the scheduler_config.json of this model",
        )
    return T


def _folder(denoiser: Denoiser) -> Path:
    place = denoiser.place
    return (
        place.component.relative_to(place.pipeline)
        if place.pipeline and place.component
        else Path()
    )


def _counterparts(
    base: Denoiser, experts: Sequence[Sequence[Denoiser]]
) -> list[tuple[int, Denoiser]]:
    """Return all experts; of a pipeline of two only its counterpart, where the base is one of two itself."""
    return [
        (i, d)
        for i, found in enumerate(experts)
        for d in found
        if len(found) == 1 or base.range is None or d.name == base.name
    ]


def _reaching(
    span: TimestepRange | None, experts: Sequence[Sequence[Denoiser]]
) -> list[tuple[int, Denoiser]]:
    return [
        (i, d)
        for i, found in enumerate(experts)
        for d in found
        if span and d.range and _overlap(d.range, span)
    ]


def _overlap(one: TimestepRange, other: TimestepRange) -> bool:
    return one.start < other.stop and other.start < one.stop


def _check_all_placed(
    experts: Sequence[Sequence[Denoiser]], sides: Sequence[TimestepRange]
) -> None:
    for expert in experts:
        path = expert[0].place.path
        if any(d.range is None for d in expert):
            raise UsageError(
                f"{path}: of two denoisers, which one it is for is not known",
                fix="give its --range START:STOP",
            )
        if len(expert) == 2 and [d.range for d in expert] != list(sides):
            raise UsageError(
                f"{path} changes its denoiser at {expert[0].range}, the output at {sides[0]}",
                fix="name its folders transformer and transformer_2 as two experts, each with its --range",
            )
