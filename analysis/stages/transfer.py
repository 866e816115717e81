"""The stage `demerge transfer`: map, base, experts and ranges checked, then the prediction, for a person and on disk.

OUT/transfer.json   experts, ranges, predicted changes with their errors, per layer where the map has sketches of layers
OUT/transfer.*      the matrix of experts and ranges, svg and png
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demerge.analysis.experts.records import settled_ranges, sha256_of
from demerge.analysis.experts.sketched import Progress
from demerge.analysis.experts.transfer import Products, Transfer, sketches_of, transfer
from demerge.analysis.stages.ranges import load_map
from demerge.conflict import ConflictMap
from demerge.errors import UsageError
from demerge.lora import open_expert
from demerge.merging.engine.validation import check_same_tensors
from demerge.merging.inputs.components import notes_about
from demerge.merging.inputs.experts import Expert, check_same_base
from demerge.provenance import versions
from demerge.storage.atomic import commit_json
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.safetensors_header import format_of
from demerge.timesteps import Partition

FORMAT = "demerge.transfer/1"
LISTED = 5
READING = (
    "negative: the expert's whole task vector lowers the loss of that range; half of it, by half as much",
    "?: unresolved, the 95 % interval covers 0",
    "first order only: along a long task vector the loss bends, near a minimum upwards; a tenth of an expert can be long",
    "`demerge coefficients` measures what is beyond first order, on the model and its data",
)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Everything one prediction takes."""

    map: ConflictMap
    base: Checkpoint
    experts: Sequence[Expert]
    names: Sequence[str]
    ranges: Partition
    inputs: Mapping[str, Any]

    @property
    def tensors(self) -> int:
        """How many tensors of the base will be read."""
        return sum(spec.is_float for spec in self.base.specs.values())

    def run(self, progress: Progress | None = None) -> Transfer:
        """Predict.

        Raises:
            InputError: where a value of an expert is not finite.
        """
        return transfer(
            self.map, self.base, self.experts, self.ranges, names=self.names, progress=progress
        )

    def lines(self) -> list[str]:
        """Return what the prediction is made from, for a person."""
        map, D = self.map, self.map.origin.parameters
        kept = (
            f"sketches of {sketches_of(map).shape[-1]:,}"
            if sketches_of(map).shape[-1] < D
            else "all kept"
        )
        text = [
            f"map       {map.N} bins, {map.M} groups of {map.origin.batch_size}; {D:,} coordinates, {kept}"
        ]
        if self.base.parameters > D:
            which = (
                f"params {map.origin.params}: {D:,} of the base's {self.base.parameters:,} numbers"
            )
            text.append(
                f"params    task vectors restricted to what the map was measured on, {which}"
            )
        text += [f"note      {note}" for note in notes_about(self.base, self.experts)]
        off = [str(cut) for cut in self.ranges.cuts if cut not in map.edges]
        if off:
            text.append(
                f"note      {', '.join(off)} within bins of the map: gradients count as constant in a bin"
            )
        return text


def prepare(
    map: Path,
    base: str,
    experts: Sequence[str],
    *,
    ranges: str | None = None,
    skip_text: bool = False,
) -> Plan:
    """Open what a prediction is made from, and check that it belongs together.

    Args:
        map: a conflict.safetensors, or its folder.
        ranges: uniform:N, joint or a partition.json; the experts' own where None.
        skip_text: leave out what a LoRA does to text encoders, which is refused else.

    Raises:
        UsageError: where the experts have no ranges that make a partition, or the ranges are of another T.
        InputError: where a file cannot be read, the map has no sketches, is in another metric or of another base, or an expert
            does not fit the base or holds NaN or Inf.
    """
    found, origin = load_map(map, base), Checkpoint.open(base)
    sketches_of(found)
    tuned = [open_expert(path, origin, skip_text=skip_text) for path in experts]
    check_same_base(origin, tuned)
    check_same_tensors(origin, tuned, [base, *experts])
    partition = settled_ranges(ranges, found.T, [base, *experts], [origin, *tuned], tuned)
    inputs = {
        "map": str(map),
        "base": {"path": base, "sha256": found.origin.model},
        "experts": [
            {"path": path, "sha256": sha256_of(each)}
            for path, each in zip(experts, tuned, strict=True)
        ],
    }
    return Plan(found, origin, tuned, short_names(experts), partition, inputs)


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the last part of each path, or the whole path where several end alike."""
    names = [Path(path).name or path for path in paths]
    count = Counter(names)
    return [name if count[name] == 1 else path for name, path in zip(names, paths, strict=True)]


def check_replaceable(out: Path) -> None:
    """Refuse an output folder that is none, or whose transfer.json is something else.

    Raises:
        UsageError: naming it.
    """
    file, fix = out / "transfer.json", "name another folder"
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is there and is not a folder", fix=fix)
    if file.exists() and format_of(file) != FORMAT:
        raise UsageError(f"{file} is there and is not a prediction of `demerge transfer`", fix=fix)


# -- what is said -----------------------------------------------------------------------------------------------------------


def document(made: Transfer, plan: Plan) -> dict[str, Any]:
    """Return the prediction as JSON values; `layers` holds lists by expert, layer and range."""
    rows = zip(made.names, plan.inputs["experts"], strict=True)
    experts = [
        {
            "name": name,
            **given,
            "norm": float(made.norms[k]),
            "outside": float(made.outside[k]),
            "ranges": {
                str(span): made.changes[k, r].document() for r, span in enumerate(made.ranges)
            },
            "total": made.total[k].document(),
        }
        for k, (name, given) in enumerate(rows)
    ]
    origin = plan.map.origin
    measured = {
        "bins": plan.map.N,
        "groups": plan.map.M,
        "batch_size": origin.batch_size,
        "params": origin.params,
    }
    sizes = {"coordinates": origin.parameters, "kept": int(sketches_of(plan.map).shape[-1])}
    layers = (
        {}
        if made.by_layer is None
        else {"layers": {"names": list(made.layers), **made.by_layer.document()}}
    )
    return {
        "format": FORMAT,
        "order": 1,
        "ranges": [[span.start, span.stop] for span in made.ranges],
        "experts": experts,
        **layers,
        "record": {
            "inputs": dict(plan.inputs),
            "map": {**measured, **sizes},
            "versions": versions("demerge"),
        },
    }


def lines(made: Transfer) -> list[str]:
    """Return the prediction for a person: experts by ranges, and the layers that do most of it."""
    heads = ["predicted change of the loss", *map(str, made.ranges), "all"]
    rows = [
        [name, *(_told(made.changes[k, r]) for r in range(len(made.ranges))), _told(made.total[k])]
        for k, name in enumerate(made.names)
    ]
    width = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    table = [
        "  ".join(f"{cell:{w}}" for cell, w in zip(row, width, strict=True)).rstrip()
        for row in (heads, *rows)
    ]
    return [*table, *READING, _sketch(made), *_restricted(made), *_layers(made)]


def _told(one: Products) -> str:
    return f"{float(one.value):+.2e} ± {float(one.half):.1e}{'' if one.resolved else ' ?'}"


def _sketch(made: Transfer) -> str:
    error, se = made.changes.sketch, made.changes.se
    if not error.any():
        return "sketch    adds no error of its own: every coordinate is kept"
    share = np.divide(error, np.hypot(error, se), out=np.zeros_like(error), where=error > 0).max()
    return f"sketch    its own error is in the intervals: up to {error.max():.0e}, at most {share:.0%} of a half width"


def _restricted(made: Transfer) -> list[str]:
    shares = [
        f"{name} {share:.0%}"
        for name, share in zip(made.names, made.outside, strict=True)
        if share >= 0.005
    ]
    return (
        [
            f"outside   of |tau|^2 on numbers that the map does not have, not counted: {', '.join(shares)}"
        ]
        if shares
        else []
    )


def _layers(made: Transfer) -> list[str]:
    """Return the resolved cells of layer, expert and range with the largest changes."""
    if made.by_layer is None:
        return []
    found = made.by_layer
    places = np.argwhere(found.resolved)
    largest = sorted(places.tolist(), key=lambda at: -abs(found.value[tuple(at)]))[:LISTED]
    rows = [
        f"layer     {made.layers[layer]}: {made.names[k]} on {made.ranges[r]} {_told(found[k, layer, r])}"
        for k, layer, r in largest
    ]
    cells = f"{len(places)} of {found.value.size} cells of layer, expert and range are resolved"
    return [
        f"layers    {cells}, by chance {found.value.size // 20} would be{'; the largest:' if rows else ''}",
        *rows,
    ]


def write(made: Transfer, plan: Plan, out: Path) -> list[Path]:
    """Write transfer.json and the plots into the folder OUT; return what was written."""
    from demerge.analysis.experts.plots import transfer_matrix
    from demerge.reporting.theme import save_figure

    commit_json(out / "transfer.json", document(made, plan))
    return [out / "transfer.json", *save_figure(transfer_matrix(made), out, "transfer")]
