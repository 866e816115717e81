"""What an analysis is about to do: model, data and settings checked, cost known, an earlier map of the same origin found."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from demerge.analysis.gradients import DRAWS, MEMORY, METRICS, Cost, Progress, cost, measure
from demerge.analysis.segmentation import METHODS, SCORES
from demerge.conflict import ConflictMap, Origin
from demerge.data import ImageData, load_images
from demerge.diffusion import Diffusion
from demerge.errors import UsageError


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything one analysis takes."""

    model: Diffusion
    data: ImageData
    bins: int
    groups: int
    batch_size: int
    draws: str
    antithetic: bool
    metric: str
    seed: int
    memory: int
    cost: Cost
    found: ConflictMap | None

    def __str__(self) -> str:
        if self.found is not None:
            return "cost      nothing: the map of this measurement is there already"
        return f"cost      {self.cost}; batches of {self.batch_size}"

    def map(self, progress: Progress | None = None) -> ConflictMap:
        """Return the map that is there, or measure it."""
        if self.found is not None:
            return self.found
        return measure(
            self.model,
            self.data,
            bins=self.bins,
            groups=self.groups,
            batch_size=self.batch_size,
            seed=self.seed,
            draws=self.draws,
            antithetic=self.antithetic,
            metric=self.metric,
            memory=self.memory,
            progress=progress,
        )


def prepare(
    model: str,
    data: str,
    out: Path,
    *,
    bins: int = 20,
    groups: int = 8,
    batch_size: int = 16,
    draws: str = "shared",
    antithetic: bool = False,
    metric: str = "euclid",
    seed: int = 0,
    split: str = "train",
    skip_broken: bool = False,
    memory: int = MEMORY,
    ranges: int = 4,
    method: str = "gradient",
    score: str = "cosine",
    device: str = "cpu",
) -> Plan:
    """Load what an analysis needs and check it before any gradient is taken.

    Raises:
        UsageError: where an argument is wrong, or OUT holds the map of another measurement.
        InputError: where model, data or a map in OUT cannot be read.
        ResourceError: where the gradients do not fit the memory.
    """
    choices = (
        ("method", method, METHODS),
        ("score", score, SCORES),
        ("draws", draws, DRAWS),
        ("metric", metric, METRICS),
    )
    for name, value, known in choices:
        if value not in known:
            raise UsageError(f"{name} '{value}' is unknown", fix=f"use one of {', '.join(known)}")
    base = Diffusion.load(model, device=device)
    if not 1 <= ranges <= bins <= base.T:
        raise UsageError(
            f"{ranges} ranges, {bins} bins and {base.T} timesteps do not fit", fix="give ranges <= bins <= timesteps"
        )
    channels, height, _ = base.image_shape
    images = load_images(data, split=split, resolution=height, channels=channels, skip_broken=skip_broken)
    total = cost(base, bins=bins, groups=groups, memory=memory)
    origin = Origin(base.sha256, images.fingerprint, base.parameters, "exact", draws, antithetic, metric, batch_size, seed)
    found = _earlier(out / "conflict.safetensors", bins, groups, origin)
    return Plan(base, images, bins, groups, batch_size, draws, antithetic, metric, seed, memory, total, found)


def _earlier(path: Path, bins: int, groups: int, origin: Origin) -> ConflictMap | None:
    """Return the map at `path` where there is one; refuse one of another measurement."""
    if not path.exists():
        return None
    map = ConflictMap.load(path)
    asked = {"bins": bins, "groups": groups} | {f.name: getattr(origin, f.name) for f in fields(Origin)}
    there = {"bins": map.N, "groups": map.M} | {f.name: getattr(map.origin, f.name) for f in fields(Origin)}
    differences = [f"{name} {there[name]} there, {asked[name]} asked" for name in asked if there[name] != asked[name]]
    if differences:
        raise UsageError(f"{path} is of another measurement: {'; '.join(differences)}", fix="choose another folder")
    return map
