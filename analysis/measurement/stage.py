"""What an analysis is about to do: model, data and settings checked, cost known, an earlier map of the same origin found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demerge.analysis.cutting.segmentation import METHODS, SCORES
from demerge.analysis.measurement.cells import Progress
from demerge.analysis.measurement.gradients import MEMORY, Cost, Measurement, Settings
from demerge.analysis.measurement.partial import Partial
from demerge.conflict import ConflictMap
from demerge.data import load_images
from demerge.diffusion import Diffusion
from demerge.errors import UsageError


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything one analysis takes; the map's place is OUT/conflict.safetensors, its finished groups' OUT/conflict.partial."""

    measurement: Measurement
    out: Path
    partial: Partial
    cost: Cost
    found: ConflictMap | None

    def __str__(self) -> str:
        if self.found is not None:
            return "cost      nothing: the map of this measurement is there already"
        return f"cost      {self.cost}; batches of {self.measurement.settings.batch_size}"

    def map(self, progress: Progress | None = None) -> ConflictMap:
        """Return the map that is there, or measure and save it; groups that an earlier call finished are not measured again.

        Raises:
            NumericalError: where a gradient is not finite.
        """
        map = self.found
        if map is None:
            map = self.measurement.run(self.partial, progress)
            map.save(self.out / "conflict.safetensors")
        self.partial.sweep()
        return map


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
    engine: str = "auto",
    params: str = "all",
    layers: bool = False,
    seed: int = 0,
    split: str = "train",
    skip_broken: bool = False,
    memory: int = MEMORY,
    ranges: int = 4,
    method: str = "gradient",
    score: str = "step",
    device: str = "cpu",
) -> Plan:
    """Load what an analysis needs and check it before any gradient is taken.

    Raises:
        UsageError: where an argument is wrong, or OUT holds the map or finished groups of another measurement.
        InputError: where model, data or a map in OUT cannot be read.
        ResourceError: where the gradients do not fit the memory.
    """
    for name, value, known in (("method", method, METHODS), ("score", score, SCORES)):
        if value not in known:
            raise UsageError(f"{name} '{value}' is unknown", fix=f"use one of {', '.join(known)}")
    settings = Settings(bins, groups, batch_size, seed, draws, antithetic, metric, engine, params, layers, memory)
    base = Diffusion.load(model, device=device)
    if not 1 <= ranges <= bins <= base.T:
        raise UsageError(
            f"{ranges} ranges, {bins} bins and {base.T} timesteps do not fit", fix="give ranges <= bins <= timesteps"
        )
    channels, height, _ = base.image_shape
    images = load_images(data, split=split, resolution=height, channels=channels, skip_broken=skip_broken)
    measurement = Measurement(base, images, settings)
    partial = Partial(out / "conflict.partial", measurement.key())
    found = _earlier(out / "conflict.safetensors", partial.key)
    if found is None:
        partial.check()
    return Plan(measurement, out, partial, measurement.cost(), found)


def _earlier(path: Path, asked: Mapping[str, Any]) -> ConflictMap | None:
    """Return the map at `path` where there is one; refuse one of another measurement."""
    if not path.exists():
        return None
    map = ConflictMap.load(path)
    there = {"bins": map.N, "groups": map.M, "layers": asked["layers"] and map.layers is not None, **asdict(map.origin)}
    differences = [f"{name} {there[name]} there, {asked[name]} asked" for name in asked if there[name] != asked[name]]
    if differences:
        raise UsageError(f"{path} is of another measurement: {'; '.join(differences)}", fix="choose another folder")
    return map
