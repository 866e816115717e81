"""The stage `demerge layers`: which layers to train, from a stored map, without model or data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demerge.analysis.layers.gains import FORMAT, LayerChoice, choose_layers
from demerge.analysis.layers.options import LayersOptions
from demerge.analysis.planning.ranges import load_map
from demerge.conflict import ConflictMap
from demerge.errors import UsageError
from demerge.progress import Progress, silent
from demerge.stage import Cost
from demerge.storage.atomic import commit_bytes, commit_json
from demerge.storage.documents import check_replaceable
from demerge.storage.safetensors_header import format_of
from demerge.timesteps import Partition

PLOTS = (".svg", ".png")


@dataclass(frozen=True, slots=True)
class LayersResult:
    """A choice of layers, and the files that it was written to."""

    choice: LayerChoice
    out: Path | None
    plot: Path | None

    def lines(self) -> list[str]:
        """Return the choice for a person."""
        return self.choice.lines()

    def document(self) -> dict[str, Any]:
        """Return the files and the content of layers.json as JSON values."""
        return {"out": self.out, "plot": self.plot, **self.choice.document()}


@dataclass(frozen=True, slots=True, eq=False)
class LayersPlan:
    """What a choice is made from."""

    options: LayersOptions
    map: ConflictMap
    ranges: Partition

    def describe(self) -> list[str]:
        """Return map and ranges."""
        map = self.map
        measured = f"{map.N} bins, {map.M} groups of {map.origin.batch_size}"
        return [f"{'map':12}  {measured}", f"{'ranges':12}  {self.ranges}"]

    def cost(self) -> Cost:
        """Return one step: it takes a second or so."""
        return Cost()

    def run(self, progress: Progress = silent) -> LayersResult:
        """Choose, and write the files that are named."""
        options = self.options
        choice = choose_layers(self.map, self.ranges, share=options.share)
        if options.out is not None:
            commit_json(options.out, choice.document())
        if options.plot is not None:
            from demerge.analysis.layers.plots import draw_gains
            from demerge.reporting.theme import render

            commit_bytes(options.plot, render(draw_gains(choice), options.plot.suffix[1:]))
        progress(1, 1)
        return LayersResult(choice, options.out, options.plot)


def plan(options: LayersOptions) -> LayersPlan:
    """Read the map and the ranges, and check the places of the files.

    Raises:
        UsageError: if a file holds something else or cannot be drawn, or the ranges are wrong.
        InputError: if the map cannot be read or is of another model.
    """
    out, plot = options.out, options.plot
    if plot is not None and (plot.suffix not in PLOTS or plot.is_dir()):
        fix = "name a file, for example --plot layers.svg"
        raise UsageError(f"plot {plot} is neither .svg nor .png", fix=fix)
    if out is not None:
        fix = "name another file, for example layers.json"
        check_replaceable(out, "a choice of layers", lambda file: format_of(file) == FORMAT, fix)
    map = load_map(options.map, options.model)
    return LayersPlan(options, map, Partition.parse(options.ranges, map.T))
