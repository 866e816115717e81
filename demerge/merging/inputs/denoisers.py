"""Pipelines of two denoisers (Wan 2.2): which experts each denoiser of the output is merged from.

    transformer    the timesteps t >= b T, high noise        transformer_2    t < b T, low noise

with b the `boundary_ratio` of model_index.json and T the scheduler's `num_train_timesteps`. For a
base of one denoiser such a pipeline is two experts, with ranges [ceil(b T), T) and [0, ceil(b T)).
With a base of two, an expert goes to the side that its range reaches into, or that its name says
(`high_noise`, `low_noise`), and each of two to its counterpart. `--boundary` makes a pipeline of
two out of a base of one denoiser. `--no-base` with such a pipeline alone makes one denoiser of its
two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demerge.errors import UsageError
from demerge.expert import find_noise_side
from demerge.storage.layout import SECOND, CheckpointLocation, locate, read_index
from demerge.timesteps import Partition, TimestepRange, count_timesteps

FIRST = "transformer"
PAIR_CLASSES = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")  # of diffusers


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A denoiser of a base or expert.

    Attributes:
        name: the name of its folder, empty for a file.
        range: the timesteps that its pipeline uses it for, None if it is the only one.
    """

    name: str
    place: CheckpointLocation
    range: TimestepRange | None = None

    @property
    def folder(self) -> Path:
        """Its folder inside its pipeline."""
        pipeline, component = self.place.pipeline, self.place.component
        return component.relative_to(pipeline) if pipeline and component else Path()


@dataclass(frozen=True, slots=True)
class Task:
    """A denoiser of the output, or another part that is merged.

    Attributes:
        folder: its folder in the output.
        base: what it is merged into.
        experts: (number of the expert in the recipe, its denoiser).
        range: the timesteps that the output uses it for, None if it is the only one.
        file: the name of its weights.
        is_denoiser: false for a text encoder, a VAE and the like.
    """

    folder: Path
    base: Denoiser
    experts: Sequence[tuple[int, Denoiser]]
    range: TimestepRange | None = None
    file: str = "diffusion_pytorch_model.safetensors"
    is_denoiser: bool = True


def find_denoisers(place: CheckpointLocation, variant: str | None = None) -> list[Denoiser]:
    """Return the denoisers of a model, high noise first: two for a pipeline with a boundary.

    A component folder inside such a pipeline is one of them, with its range.

    Raises:
        InputError: if the boundary is missing or not in (0, 1), or the second denoiser is damaged.
    """
    component = place.component.resolve() if place.component else None
    name = component.name if component else ""
    if component is None or name not in (FIRST, SECOND):
        return [Denoiser(name, place)]
    folder = place.pipeline or component.parent
    partition = Partition.of_pipeline(folder)
    if partition is None:
        return [Denoiser(name, place)]
    ranges = name_halves(partition)
    first = Denoiser(name, place, ranges[name])
    if place.pipeline is None:
        return [first]
    return [first, Denoiser(SECOND, locate(folder, variant, SECOND), ranges[SECOND])]


def assign_experts(
    base: Sequence[Denoiser],
    experts: Sequence[Sequence[Denoiser]],
    ranges: Sequence[TimestepRange | None],
    boundary: float | None = None,
) -> list[Task]:
    """Return the denoisers of the output, high noise first, each with its experts.

    Args:
        base: of `find_denoisers`.
        experts: of `find_denoisers`, for each expert of the recipe.
        ranges: of each expert of the recipe; a pipeline of two has its own.
        boundary: b, if the output gets two denoisers from a base of one.

    Raises:
        UsageError: if it is not known, or not possible, which denoiser an expert belongs to.
    """
    known: list[tuple[int, Denoiser]] = []
    for i, (denoisers, span) in enumerate(zip(experts, ranges, strict=True)):
        known += [(i, replace(each, range=each.range or span)) for each in denoisers]
    if len(base) == 1 and boundary is None:
        only = base[0]
        span = only.range if only.place.pipeline else None
        if only.range is not None:  # of a pipeline of two denoisers only the counterpart
            known = [(i, d) for i, d in known if len(experts[i]) == 1 or d.name == only.name]
        return [Task(only.folder, only, known, span)]
    if len(base) == 2 and boundary is not None:
        what = f"{base[0].place.path} has two denoisers already"
        raise UsageError(what, fix="leave --boundary out")
    if len(base) == 2:
        tasks = [Task(side.folder, side, [], side.range) for side in base]
    else:
        T = count_timesteps(base[0].place.pipeline)
        halves = name_halves(Partition.from_boundary(boundary or 0.0, T))
        tasks = [Task(Path(name), base[0], [], halves[name]) for name in (FIRST, SECOND)]
    sides = {"high": tasks[0].range, "low": tasks[1].range}
    for n, (i, denoiser) in enumerate(known):
        side = None if denoiser.range else find_noise_side(denoiser.place)
        if side is not None:
            known[n] = (i, replace(denoiser, range=sides[side]))
    for i in range(len(experts)):
        _check_sides([each for j, each in known if j == i], [task.range for task in tasks])
    for n, task in enumerate(tasks):
        inside = [(i, each) for i, each in known if _overlap(task.range, each.range)]
        tasks[n] = task = replace(task, experts=inside)
        if boundary is not None and not inside:
            what = f"no expert reaches into {task.range}, and {task.folder} would be the base"
            raise UsageError(what, fix="name one")
    return tasks


def name_halves(partition: Partition) -> dict[str, TimestepRange]:
    """Return the range of each of a pipeline's two denoisers, high noise first."""
    low, high = partition
    return {FIRST: high, SECOND: low}


def make_pair_index(base: CheckpointLocation, boundary: float) -> dict[str, Any]:
    """Return the model_index.json of a pipeline of two denoisers, made of a base of one.

    Raises:
        UsageError: if the base is not a pipeline whose class takes two.
    """
    index = read_index(base.pipeline) if base.pipeline else {}
    kind = index.get("_class_name")
    if kind not in PAIR_CLASSES or FIRST not in index:
        what = f"{base.path} is {f'a {kind}' if kind else 'not a pipeline'}"
        what = f"{what}: stock diffusers gives it one denoiser, --boundary two"
        fix = f"use a pipeline folder of class {', '.join(PAIR_CLASSES)}"
        raise UsageError(what, fix=fix)
    return {**index, SECOND: index[FIRST], "boundary_ratio": boundary}


def make_single_index(base: CheckpointLocation) -> dict[str, Any]:
    """Return the model_index.json of a pipeline of one denoiser, made of a base of two."""
    index = read_index(base.pipeline) if base.pipeline else {}
    return {**index, SECOND: [None, None], "boundary_ratio": None}


def _overlap(one: TimestepRange | None, other: TimestepRange | None) -> bool:
    return bool(one and other and one.start < other.stop and other.start < one.stop)


def _check_sides(denoisers: Sequence[Denoiser], sides: Sequence[TimestepRange | None]) -> None:
    """Refuse an expert of which it is not known, or not possible, which side it belongs to."""
    path, spans = denoisers[0].place.path, [denoiser.range for denoiser in denoisers]
    if None in spans:
        what = f"cannot tell which of the two denoisers {path} belongs to"
        raise UsageError(
            what, fix="give its --range START:STOP, or name it _high_noise or _low_noise"
        )
    if len(spans) == 2 and spans != list(sides):
        what = f"{path} changes its denoiser at {spans[0]}, the output at {sides[0]}"
        fix = "name its folders transformer and transformer_2 as two experts, with --range each"
        raise UsageError(what, fix=fix)
