"""What to do after an analysis, as commands that can be copied: train, measure more, look at layers.

Names of models and files are quoted for a shell, whatever they are.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demerge.analysis.cutting.needed import MOST
from demerge.analysis.measurement.settings import Settings
from demerge.conflict import ConflictMap, K
from demerge.timesteps import Partition

USUAL = Settings()
DEFAULTS = {
    "bins": USUAL.bins,
    "groups": USUAL.groups,
    "train-batch-size": USUAL.batch_size,
    "draws": USUAL.draws,
    "antithetic": USUAL.antithetic,
    "metric": USUAL.metric,
    "engine": "exact",  # what auto comes to where it fits
    "params": USUAL.params,
    "mixed-precision": USUAL.precision,
    "seed": USUAL.seed,
}
Step = tuple[str, list[str]]


@dataclass(frozen=True, slots=True)
class Names:
    """What the commands on the page are about: model, data and its split, and the files of the map and of its cut."""

    model: str = "MODEL"
    data: str = "DATA"
    split: str = "train"
    map: Path = Path("conflict.safetensors")
    partition: Path = Path("partition.json")

    def on(self) -> str:
        """Return model, data and split as words of a command."""
        split = [] if self.split == "train" else ["--split", self.split]
        return shlex.join([self.model, "--data", self.data, *split])


def steps(map: ConflictMap, partition: Partition, said: Mapping[str, Any], names: Names) -> list[Step]:
    """Return what to do next, each with the commands that do it; without a promise, seeing more comes first."""
    experts = _experts(map, partition, said, names) if len(partition) > 1 else []
    hidden, known = _hidden(map, said, names), len(said["unresolved"]) < map.N
    ordered = [*experts, *hidden] if said["benefit"]["promised"] else [*hidden, *experts]
    return [*ordered, *(_layers(map, names) if known and len(partition) > 1 else [])]


def _experts(map: ConflictMap, partition: Partition, said: Mapping[str, Any], names: Names) -> list[Step]:
    file = shlex.quote(str(names.partition))
    what = "Train an expert for each range" if said["benefit"]["promised"] else "To try all the same: an expert for each range"
    train = [
        f"demerge finetune {names.on()} --ranges {file} -o experts",
        f"demerge finetune {names.on()} --ranges joint:{len(partition)} -o joint",
    ]
    found = [(f"{what}, and the control that gets as many steps without ranges.", train)]
    if map.sketches is not None:
        folders = " ".join(f"experts/{span}" for span in partition)
        moved = f"demerge transfer {shlex.quote(str(names.map))} {folders} --base {shlex.quote(names.model)}"
        found.append(("Once they are trained: what each does to each range, predicted from the map alone.", [moved]))
    return found


def _hidden(map: ConflictMap, said: Mapping[str, Any], names: Names) -> list[Step]:
    if not said["unresolved"] or said["groups_needed"] >= MOST:
        return []
    groups, folder = said["groups_needed"], names.map.parent if names.map.suffix else names.map
    why = f"{len(said['unresolved'])} of {map.N} bins are unresolved; some {groups:,} groups or more would do."
    if map.origin.engine == "exact" and map.origin.parameters > K:  # such a map cannot be extended
        return [(why, [_again(map, names, Path("conflict-more"), groups=groups, engine="sketch")])]
    return [(why, [_again(map, names, folder, groups=groups)])]


def _layers(map: ConflictMap, names: Names) -> list[Step]:
    stored, measure = names.map, []
    if map.layers is None:
        stored = Path("conflict-layers")
        measure = [f"{_again(map, names, stored, metric='adam')} --layers"]
    rank = f"demerge layers {shlex.quote(str(stored))} --ranges {shlex.quote(str(names.partition))} -o layers.json"
    return [("Which layers conflict, to train only these with finetune --train-layers layers.json.", [*measure, rank])]


def _again(map: ConflictMap, names: Names, out: Path, **changes: object) -> str:
    """Return the command that measures the map again, but for `changes`."""
    origin = map.origin
    asked = {
        "bins": map.N,
        "groups": map.M,
        "train-batch-size": origin.batch_size,
        "draws": origin.draws,
        "antithetic": origin.noise,
        "metric": origin.metric,
        "engine": origin.kept,
        "params": origin.params,
        "mixed-precision": origin.precision,
        "seed": origin.seed,
    }
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in {**asked, **changes}.items() if value != DEFAULTS[name]]
    return " ".join(["demerge analyze", names.on(), *words, "-o", shlex.quote(str(out))])
