"""What to do after an analysis, as commands that can be copied: train, measure more, look at layers.

Names of models and files are quoted for a shell, whatever they are.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demerge.analysis.measurement.options import GROUPS, MeasurementOptions
from demerge.analysis.partitioning.sample_size import MOST
from demerge.conflict import MAX_CELLS, ConflictMap
from demerge.timesteps import Partition

USUAL = MeasurementOptions()
DEFAULTS = {
    "bins": USUAL.bins,
    "groups": GROUPS,
    "batch-size": USUAL.batch_size,
    "draws": USUAL.draws,
    "antithetic": USUAL.antithetic,
    "metric": USUAL.metric,
    "engine": "exact",  # what auto comes to where it fits
    "params": USUAL.params,
    "mixed-precision": USUAL.mixed_precision,
    "seed": USUAL.seed,
}
Step = tuple[str, list[str]]


@dataclass(frozen=True, slots=True)
class Names:
    """What the commands on the page are about.

    Attributes:
        model, data: as they were named on the command line.
        options: words of the command line that say how data is read, known to `analyze` and `finetune`.
        map, partition: the files of the map, or its folder, and of its cut.
    """

    model: str = "MODEL"
    data: str = "DATA"
    options: tuple[str, ...] = ()
    map: Path = Path("conflict.safetensors")
    partition: Path = Path("partition.json")

    def on(self) -> str:
        """Return model and data as words of a command."""
        return shlex.join([self.model, "--data", self.data, *self.options])

    @property
    def folder(self) -> Path:
        """The folder of the map."""
        return self.map.parent if self.map.suffix == ".safetensors" else self.map

    def beside(self, name: str) -> str:
        """Return a place in the run, next to the folder of the map, as a word of a command."""
        return shlex.quote(str(self.folder.parent / name))


def steps(
    map: ConflictMap, partition: Partition, said: Mapping[str, Any], names: Names
) -> list[Step]:
    """Return what to do next, each with the commands that do it; without a promise, seeing more comes first."""
    experts = _experts(map, partition, said, names) if len(partition) > 1 else []
    hidden, known = _hidden(map, said, names), len(said["unresolved"]) < map.N
    ordered = [*experts, *hidden] if said["benefit"]["promised"] else [*hidden, *experts]
    return [*ordered, *(_layers(map, names) if known and len(partition) > 1 else [])]


def _experts(
    map: ConflictMap, partition: Partition, said: Mapping[str, Any], names: Names
) -> list[Step]:
    file = shlex.quote(str(names.partition))
    what = (
        "Train an expert for each range"
        if said["benefit"]["promised"]
        else "To try all the same: an expert for each range"
    )
    train = [
        f"demerge finetune {names.on()} --ranges {file} -o {names.beside('experts')}",
        f"demerge finetune {names.on()} --ranges joint:{len(partition)} -o {names.beside('joint')}",
    ]
    found = [(f"{what}, and the control that gets as many steps without ranges.", train)]
    if map.sketches is not None:
        folders = " ".join(names.beside(f"experts/{span}") for span in partition)
        moved = f"demerge transfer {shlex.quote(str(names.map))} {folders} --base {shlex.quote(names.model)}"
        found.append(
            (
                "Once they are trained: what each does to each range, predicted from the map alone.",
                [moved],
            )
        )
    return found


def _hidden(map: ConflictMap, said: Mapping[str, Any], names: Names) -> list[Step]:
    """Say what resolves more: more groups of the same map or, if it cannot hold as many, larger batches in another."""
    groups, most = said["groups_needed"], MAX_CELLS // map.N
    if not said["unresolved"] or groups >= MOST:
        return []
    why = f"{len(said['unresolved'])} of {map.N} bins are unresolved; some {groups:,} groups or more would do"
    if groups <= most:
        return [
            (
                f"{why}. They are added to the map.",
                [_again(map, names, shlex.quote(str(names.folder)), groups=groups)],
            )
        ]
    batch = 2 * math.ceil(map.origin.batch_size * groups / map.M / 2)
    larger = _again(map, names, names.beside(f"{names.folder.name}-more"), **{"batch-size": batch})
    return [(f"{why}, or as many as there are with batches of {batch:,}.", [larger])]


def _layers(map: ConflictMap, names: Names) -> list[Step]:
    stored, measure = shlex.quote(str(names.map)), []
    if map.layers is None:
        stored = names.beside(f"{names.folder.name}-layers")
        measure = [_again(map, names, stored, layers=True, metric="adam")]
    rank = f"demerge layers {stored} --ranges {shlex.quote(str(names.partition))} -o {names.beside('layers.json')}"
    return [
        (
            "Which layers conflict, to train only these with finetune --train-layers layers.json.",
            [*measure, rank],
        )
    ]


def _again(
    map: ConflictMap, names: Names, out: str, *, layers: bool = False, **changes: object
) -> str:
    """Return the command that measures the map again into `out`, a word of a command, but for `changes`."""
    origin = map.origin
    asked = {
        "bins": map.N,
        "groups": map.M,
        "batch-size": origin.batch_size,
        "draws": origin.draws,
        "antithetic": origin.noise,
        "metric": origin.metric,
        "engine": origin.kept,
        "params": origin.params,
        "mixed-precision": origin.precision,
        "seed": origin.seed,
    }
    words = [
        f"--{name} {shlex.quote(str(value))}"
        for name, value in {**asked, **changes}.items()
        if value != DEFAULTS[name]
    ]
    words += ["--layers"] if layers or map.layers is not None else []
    return " ".join(["demerge analyze", names.on(), *words, "-o", out])
