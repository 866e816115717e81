"""What to do after an analysis, as commands that can be copied: train, measure more, see layers.

Names of models and files are quoted for a shell, whatever they are.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from demerge.analysis.measurement.options import GROUPS, MeasurementOptions
from demerge.analysis.partitioning.resolution import MOST_GROUPS
from demerge.analysis.report.summary import ConflictSummary
from demerge.conflict import MAX_CELLS


class Step(NamedTuple):
    """What to do, and the commands that do it."""

    text: str
    commands: list[str]


@dataclass(frozen=True, slots=True)
class CommandNames:
    """What the commands on the page are about."""

    model: str = "MODEL"  # as on the command line
    data: str = "DATA"
    options: tuple[str, ...] = ()  # how data is read, words of `analyze` and `finetune`
    map: Path = Path("conflict.safetensors")  # the file of the map, or its folder
    partition: Path = Path("partition.json")

    @property
    def inputs(self) -> str:
        """Model and data as words of a command."""
        return shlex.join([self.model, "--data", self.data, *self.options])

    @property
    def folder(self) -> Path:
        """The folder of the map."""
        return self.map.parent if self.map.suffix == ".safetensors" else self.map

    def next_to(self, name: str) -> str:
        """Return a path next to the folder of the map, as a word of a command."""
        return shlex.quote(str(self.folder.parent / name))


def next_steps(summary: ConflictSummary, names: CommandNames) -> list[Step]:
    """Return what to do next; without a promise, measuring more comes first."""
    more = _measure_more(summary, names)
    if len(summary.partition) == 1:
        return more
    train = _train(summary, names)
    steps = [*train, *more] if summary.expected_gain.is_promised else [*more, *train]
    if summary.reading.bins.resolved.any():
        steps.append(_layers(summary, names))
    return steps


def _train(summary: ConflictSummary, names: CommandNames) -> list[Step]:
    partition, file = summary.partition, shlex.quote(str(names.partition))
    text = "Train" if summary.expected_gain.is_promised else "To try all the same: train"
    finetune = f"demerge finetune {names.inputs} --ranges"
    experts = f"{finetune} {file} -o {names.next_to('experts')}"
    joint = f"{finetune} joint:{len(partition)} -o {names.next_to('joint')}"
    control = "and the control that gets as many steps without ranges"
    steps = [Step(f"{text} an expert for each range, {control}.", [experts, joint])]
    if summary.reading.map.sketches is not None:
        trained = " ".join(names.next_to(f"experts/{span}") for span in partition)
        map, base = shlex.quote(str(names.map)), shlex.quote(names.model)
        text = "After training: predict what each expert does to each range, from the map alone."
        steps.append(Step(text, [f"demerge transfer {map} {trained} --base {base}"]))
    return steps


def _measure_more(summary: ConflictSummary, names: CommandNames) -> list[Step]:
    """Return what resolves more bins: more groups, or larger batches if the map is full."""
    map, groups = summary.reading.map, summary.groups_needed
    if not summary.unresolved or groups >= MOST_GROUPS:
        return []
    hidden = f"{len(summary.unresolved)} of {map.N} bins are unresolved"
    text = f"{hidden}. Some {groups:,} groups or more would resolve them"
    if groups <= MAX_CELLS // map.N:
        again = _measure_again(summary, names, shlex.quote(str(names.folder)), groups=groups)
        return [Step(f"{text}. They are added to the map.", [again])]
    batch = 2 * math.ceil(map.origin.batch_size * groups / map.M / 2)
    out = names.next_to(f"{names.folder.name}-more")
    larger = _measure_again(summary, names, out, batch_size=batch)
    return [Step(f"{text}, or the present {map.M} with batches of {batch:,}.", [larger])]


def _layers(summary: ConflictSummary, names: CommandNames) -> Step:
    map = summary.reading.map
    stored, commands = shlex.quote(str(names.map)), []
    if map.layers is None:
        stored = names.next_to(f"{names.folder.name}-layers")
        commands = [_measure_again(summary, names, stored, layers=True, metric="adam")]
    ranges = shlex.quote(str(names.partition))
    commands.append(f"demerge layers {stored} --ranges {ranges} -o {names.next_to('layers.json')}")
    text = "Find the layers that conflict. `finetune --train-layers layers.json` trains only these."
    return Step(text, commands)


def _measure_again(
    summary: ConflictSummary, names: CommandNames, out: str, **changes: object
) -> str:
    """Return the command that measures the map again into `out`, a word, with some changes."""
    map = summary.reading.map
    origin, usual = map.origin, MeasurementOptions()
    options = {
        "bins": (map.N, usual.bins),
        "groups": (map.M, GROUPS),
        "batch_size": (origin.batch_size, usual.batch_size),
        "draws": (origin.draws, usual.draws),
        "antithetic": (origin.noise, usual.antithetic),
        "metric": (origin.metric, usual.metric),
        "engine": (origin.kept, "exact"),  # what auto comes to if that fits
        "params": (origin.params, usual.params),
        "lora_rank": (origin.lora_rank or usual.lora_rank, usual.lora_rank),
        "target_modules": (",".join(origin.target_modules), ""),
        "mixed_precision": (origin.precision, usual.mixed_precision),
        "seed": (origin.seed, usual.seed),
    }
    words = []
    for name, (value, default) in options.items():
        value = changes.get(name, value)
        if value != default:
            words.append(f"--{name.replace('_', '-')} {shlex.quote(str(value))}")
    if summary.is_given and not summary.inside:
        words.append(f"--ranges {summary.partition.text}")
    if changes.get("layers") or map.layers is not None:
        words.append("--layers")
    return " ".join(["demerge analyze", names.inputs, *words, "-o", out])
