"""The stage `demerge transfer`: map, base, experts and ranges checked, then the prediction.

OUT/transfer.json   experts, ranges, predicted changes with their errors, also per layer if the map
                    has sketches of layers
OUT/transfer.*      the matrix of experts and ranges, svg and png
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from demerge.analysis.experts.first_order import Products, Transfer, predict_transfer, sketches_of
from demerge.analysis.experts.inputs import OpenedExperts, open_experts
from demerge.analysis.experts.options import TransferOptions
from demerge.analysis.planning.ranges import load_map
from demerge.conflict import ConflictMap
from demerge.errors import UsageError
from demerge.progress import Progress, silent
from demerge.provenance import versions
from demerge.stage import Cost
from demerge.storage.atomic import commit_json
from demerge.storage.documents import check_replaceable
from demerge.storage.safetensors_header import format_of
from demerge.timesteps import Partition

FORMAT = "demerge.transfer/1"
LISTED = 5
LEGEND = (
    "negative: the whole task vector lowers the loss of that range; half of it, by half as much",
    "?: unresolved, the 95 % interval covers 0",
    "first order only: along a long task vector the loss bends, near a minimum upwards",
    "`demerge coefficients` measures what is beyond first order, on the model and its data",
)


@dataclass(frozen=True, slots=True, eq=False)
class TransferResult:
    """A prediction, its plan, and the files that were written."""

    transfer: Transfer
    plan: TransferPlan
    files: Sequence[Path] = ()

    def document(self) -> dict[str, Any]:
        """Return the folder, its files, and the content of transfer.json as JSON values."""
        out = self.plan.options.out
        return {"out": out, "files": list(self.files), **transfer_file(self.transfer, self.plan)}

    def lines(self) -> list[str]:
        """Return the table of experts by ranges, how to read it, and the largest layers."""
        made = self.transfer
        columns = [*map(str, made.ranges), "all"]
        table = pd.DataFrame(index=list(made.names), columns=columns)
        for k, name in enumerate(made.names):
            cells = [made.changes[k, r] for r in range(len(made.ranges))]
            table.loc[name] = [_format(cell) for cell in (*cells, made.total[k])]
        rows = table.rename_axis(columns="predicted change of the loss").to_string().splitlines()
        notes = [*LEGEND, self._sketch_error(), *self._outside(), *self._largest_layers()]
        return [self._verdict(), *rows, *notes]

    def _verdict(self) -> str:
        """Say how many changes are resolved, and what to do."""
        changes = self.transfer.changes
        lower = int((changes.resolved & (changes.value < 0)).sum())
        higher = int(changes.resolved.sum()) - lower
        counts = f"{lower} of {changes.value.size} losses fall and {higher} rise, beyond the errors"
        return f"predicted: {counts}. Measure them with `demerge landscape`."

    def _sketch_error(self) -> str:
        error, se = self.transfer.changes.sketch, self.transfer.changes.se
        if not error.any():
            return "sketch    adds no error of its own: every coordinate is kept"
        share = np.divide(error, np.hypot(error, se), out=np.zeros_like(error), where=error > 0)
        size = f"up to {error.max():.0e}, at most {share.max():.0%} of a half width"
        return f"sketch    its own error is in the intervals: {size}"

    def _outside(self) -> Iterator[str]:
        pairs = zip(self.transfer.names, self.transfer.outside, strict=True)
        shares = [f"{name} {share:.0%}" for name, share in pairs if share >= 0.005]
        if shares:
            what = "share of |tau|^2 that the map does not have, not counted"
            yield f"outside   {what}: {', '.join(shares)}"

    def _largest_layers(self) -> Iterator[str]:
        """Yield the resolved cells of layer, expert and range with the largest changes."""
        made, layers = self.transfer, self.transfer.by_layer
        if layers is None:
            return
        cells = np.argwhere(layers.resolved).tolist()
        cells.sort(key=lambda at: -abs(layers.value[tuple(at)]))
        count = f"{len(cells)} of {layers.value.size} cells of layer, expert and range are resolved"
        listing = "; the largest:" if cells else ""
        yield f"layers    {count}, by chance {layers.value.size // 20} would be{listing}"
        for k, layer, r in cells[:LISTED]:
            cell = f"{made.layers[layer]}: {made.names[k]} on {made.ranges[r]}"
            yield f"layer     {cell} {_format(layers[k, layer, r])}"


@dataclass(frozen=True, slots=True, eq=False)
class TransferPlan:
    """What a prediction is made from."""

    options: TransferOptions
    map: ConflictMap
    opened: OpenedExperts
    ranges: Partition

    def describe(self) -> list[str]:
        """Return map, parameters and notes."""
        map, D, kept = self.map, self.map.origin.parameters, sketches_of(self.map).shape[-1]
        held = f"sketches of {kept:,}" if kept < D else "all kept"
        groups = f"{map.N} bins, {map.M} groups of {map.origin.batch_size}"
        lines = [f"map       {groups}; {D:,} coordinates, {held}"]
        total = self.opened.base.parameters
        if total > D:
            which = f"params {map.origin.params}: {D:,} of the base's {total:,} numbers"
            lines.append(f"params    only what the map was measured on counts, {which}")
        lines += self.opened.notes
        inner = sorted(set(self.ranges.cuts) - set(map.edges))
        if inner:
            what = "within bins of the map: gradients count as constant in a bin"
            lines.append(f"note      {', '.join(str(cut) for cut in inner)} {what}")
        return lines

    def cost(self) -> Cost:
        """Return how many tensors of the base are read."""
        return Cost(steps=sum(spec.is_float for spec in self.opened.base.specs.values()))

    def run(self, progress: Progress = silent) -> TransferResult:
        """Predict, and write the folder if one is named."""
        opened, out, files = self.opened, self.options.out, list[Path]()
        names = short_names(opened.paths)
        made = predict_transfer(
            self.map, opened.base, opened.models, self.ranges, names=names, progress=progress
        )
        if out is not None:
            from demerge.analysis.experts.plots import draw_transfer
            from demerge.reporting.theme import save_figure

            files = [commit_json(out / "transfer.json", transfer_file(made, self))]
            files += save_figure(draw_transfer(made), out, "transfer")
        return TransferResult(made, self, files)


def plan(options: TransferOptions) -> TransferPlan:
    """Open what a prediction is made from, and check that it fits together.

    Raises:
        UsageError: if the experts' ranges are not a partition, the ranges are of another T, or
            `out` holds something else.
        InputError: if a file cannot be read, the map has no sketches, is in another metric or of
            another base, or an expert does not fit the base or holds NaN or Inf.
    """
    if options.out is not None:
        file, fix = options.out / "transfer.json", "name another folder"
        if options.out.exists() and not options.out.is_dir():
            raise UsageError(f"{options.out} exists and is not a folder", fix=fix)
        kind = "a prediction of `demerge transfer`"
        check_replaceable(file, kind, lambda file: format_of(file) == FORMAT, fix)
    map = load_map(options.map, options.base)
    sketches_of(map)
    opened = open_experts(options.base, options.experts, skip_text=options.skip_text_encoder)
    ranges = opened.find_ranges(options.ranges, map.T)
    return TransferPlan(options, map, opened, ranges)


def transfer_file(made: Transfer, plan: TransferPlan) -> dict[str, Any]:
    """Return the content of transfer.json; `layers` holds lists by expert, layer and range."""
    experts, sources, origin = [], plan.opened.describe_models(), plan.map.origin
    for k, source in enumerate(sources):
        changes = {str(span): made.changes[k, r].document() for r, span in enumerate(made.ranges)}
        row = {"name": made.names[k], **source, "norm": float(made.norms[k])}
        row |= {"outside": float(made.outside[k]), "ranges": changes}
        experts.append({**row, "total": made.total[k].document()})
    ranges = [[span.start, span.stop] for span in made.ranges]
    document: dict[str, Any] = {"format": FORMAT, "order": 1, "ranges": ranges, "experts": experts}
    if made.by_layer is not None:
        document["layers"] = {"names": list(made.layers), **made.by_layer.document()}
    size = {"bins": plan.map.N, "groups": plan.map.M, "batch_size": origin.batch_size}
    kept = int(sketches_of(plan.map).shape[-1])
    map_record = {**size, "params": origin.params, "coordinates": origin.parameters, "kept": kept}
    base = {"path": plan.options.base, "sha256": origin.model}
    inputs = {"map": str(plan.options.map), "base": base, "experts": sources}
    record = {"inputs": inputs, "map": map_record, "versions": versions("demerge")}
    return {**document, "record": record}


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the last part of each path, or the whole path if several end alike."""
    names = [Path(path).name or path for path in paths]
    count = Counter(names)
    return [name if count[name] == 1 else path for name, path in zip(names, paths, strict=True)]


def _format(one: Products) -> str:
    return f"{float(one.value):+.2e} ± {float(one.half):.1e}{'' if one.resolved else ' ?'}"
