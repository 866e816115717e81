"""The stage `demerge landscape`: task vectors compared, and held-out losses around the base.

    paths     from the base to a merged model; without one, to each expert, s = 0, 1/P .. 3/2
    plane     of the two experts whose task vectors agree least, from -1/P to 1 + 1/P each

P is `points`, the steps from the base to an expert. Losses are of the test split by default, which
experts have not seen. The ranges are by default the experts' own, as finetuning leaves them; then
layers by experts is layers by ranges.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from demerge.analysis.experts.inputs import open_experts
from demerge.analysis.experts.loss_landscape import Landscape, Probe, measure_landscape
from demerge.analysis.experts.options import LandscapeOptions
from demerge.analysis.experts.task_vectors import TaskVectors, compare_task_vectors
from demerge.analysis.similarity import t_quantile
from demerge.device import resolve_device
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.evaluation.metrics.range_losses import BLOCKS
from demerge.merging.inputs.experts import ExpertWeights as Expert
from demerge.progress import Progress, silent
from demerge.provenance import versions
from demerge.stage import Cost
from demerge.storage.atomic import check_is_new, commit_dir, commit_json, commit_text, place_for
from demerge.timesteps import Partition, TimestepRange

FORMAT = "demerge.landscape/1"
BATCH = 64


@dataclass(frozen=True, slots=True, eq=False)
class LandscapeResult:
    """What was found around a base."""

    labels: tuple[str, ...]  # of the experts, their ranges if they have some
    vectors: TaskVectors
    paths: Mapping[str, Landscape]  # by the name of the model that each leads to
    pair: tuple[str, ...]  # the labels of the plane's experts; empty without a plane
    plane: Landscape | None
    record: Mapping[str, Any]  # inputs, options, seed and versions as JSON values
    out: Path | None  # None if nothing was written
    files: Sequence[Path] = ()

    def document(self) -> dict[str, Any]:
        """Return the folder, its files, and the content of landscape.json as JSON values."""
        return {"out": self.out, "files": list(self.files), **self.landscape_file()}

    def landscape_file(self) -> dict[str, Any]:
        """Return all of it as JSON values; what is not defined is null."""
        vectors = self.vectors
        compared = {
            "labels": list(self.labels),
            "norms": _plain(vectors.whole().norms[0]),
            "cosine": _plain(vectors.cosine),
            "sign_conflict": _plain(vectors.sign_conflict),
            "effective_rank": vectors.effective_rank,
        }
        for name, table in self._tables():
            compared[name] = _rows(table.reset_index())
        plane = None
        if self.plane is not None:
            plane = {"experts": list(self.pair), "points": _rows(self.plane.table())}
        paths = {name: _rows(path.table()) for name, path in self.paths.items()}
        losses = {"paths": paths, "plane": plane, "record": dict(self.record)}
        return {"format": FORMAT, "task_vectors": compared, **losses}

    def _tables(self) -> Iterator[tuple[str, pd.DataFrame]]:
        parts = {"blocks": self.vectors.by_block(), "layers": self.vectors.by_layer()}
        for name, part in parts.items():
            yield name, part.table(self.labels).rename_axis("name")

    def save(self, out: Path) -> list[Path]:
        """Write document, tables and plots into a new folder; return its files."""
        from demerge.analysis.experts import plots
        from demerge.reporting.theme import save_figure

        with commit_dir(out) as folder:
            commit_json(folder / "landscape.json", self.landscape_file())
            for name, table in self._tables():
                commit_text(folder / f"{name}.csv", table.to_csv(lineterminator="\n"))
            for kind in ("block", "layer"):
                draw = getattr(plots, f"draw_norms_by_{kind}")
                save_figure(draw(self.vectors, self.labels), folder, f"norms_by_{kind}")
            for i, (name, path) in enumerate(self.paths.items()):
                file = "loss_along_path" if len(self.paths) == 1 else f"loss_along_path_{i}"
                save_figure(plots.draw_path(path, name), folder, file)
            if self.plane is not None:
                save_figure(plots.draw_plane(self.plane, self.pair), folder, "loss_on_plane")
        return sorted(out.iterdir())

    def lines(self) -> list[str]:
        """Return the verdict, then task vectors, paths and plane."""
        return [self._verdict(), *self._compared(), *self._along(), *self._on_plane()]

    def _verdict(self) -> str:
        """Say how many losses fall at the ends of the paths, and what to do."""
        tables = [path.table() for path in self.paths.values()]
        ends = pd.concat([table[table.s == 1] for table in tables])
        half = t_quantile(BLOCKS) * ends.se
        lower, higher = int((ends.change < -half).sum()), int((ends.change > half).sum())
        counts = f"{lower} lower and {higher} higher than the base's, of {len(ends)}"
        return f"losses at the ends of the paths: {counts}. Compare images with `demerge evaluate`."

    def _compared(self) -> Iterator[str]:
        vectors, labels = self.vectors, [label[:12] for label in self.labels]
        parts = (vectors.by_block(), vectors.whole())
        table = pd.concat([part.table(self.labels) for part in parts])
        table.columns = pd.Index([*labels, "cosine", "opposed", "rank"], name="length by block")
        forms = {"cosine": "{:.2f}".format, "opposed": "{:.0%}".format, "rank": "{:.1f}".format}
        yield from table.to_string(formatters=forms, float_format="%.4g").splitlines()
        for n, k in combinations(range(len(labels)), 2):
            cosine, opposed = vectors.cosine[k, n], vectors.sign_conflict[k, n]
            yield f"{labels[n]} and {labels[k]}: cosine {cosine:.2f}, opposed {opposed:.0%}"

    def _along(self) -> Iterator[str]:
        for name, path in self.paths.items():
            for span, rows, best in _best_points(path):
                end = _format(rows[rows.s == 1].iloc[0])
                lowest = f"s = {best.s:g}: {_format(best)}" if best.s else "the base"
                yield f"path to {name[:20]:12s}  loss in {span}: {end}, lowest at {lowest}"

    def _on_plane(self) -> Iterator[str]:
        if self.plane is None:
            return
        first, second = self.pair
        for span, _, best in _best_points(self.plane):
            point = f"{best.w_i:g} {first} {best.w_j:+g} {second}"
            yield f"plane {first} x {second}  loss in {span}: lowest at {point}: {_format(best)}"
        yield "The lowest points were picked on these images: their losses are a little too low."


@dataclass(frozen=True, slots=True, eq=False)
class LandscapePlan:
    """What is compared and measured."""

    options: LandscapeOptions
    probe: Probe
    vectors: TaskVectors
    experts: Mapping[str, Expert]  # by label
    ends: Mapping[str, Expert]  # the models that paths lead to, by name
    pair: tuple[str, ...]  # the labels of the plane's experts; empty without a plane
    inputs: Mapping[str, Any]
    notes: Sequence[str]
    seconds: float  # of a batch, measured

    @property
    def path_points(self) -> list[tuple[float, ...]]:
        """The points of a path."""
        points = self.options.points
        return [(i / points,) for i in range(points + math.ceil(points / 2) + 1)]

    @property
    def plane_points(self) -> list[tuple[float, ...]]:
        """The points of the plane, if there is one."""
        steps = [i / self.options.points for i in range(-1, self.options.points + 2)]
        return [(i, j) for j in steps for i in steps] if self.pair else []

    def describe(self) -> list[str]:
        """Return notes, data, ranges, paths, plane and cost."""
        data, condition = self.probe.data, self.probe.model.describe_condition(self.probe.data)
        plane, side = "none", self.options.points + 3
        if self.pair:
            plane = f"{' and '.join(self.pair)}, {side} x {side} points"
        images = f"{data.name}, {data.split}: {len(data):,} images"
        steps, seconds = self.cost().steps, self.cost().seconds
        passes = steps * self.options.samples * len(self.probe.ranges)
        return [
            *(f"note    {path} was trained on these images" for path in self.inputs["trained_on"]),
            *self.notes,
            f"data    {images}; {condition}" if condition else f"data    {images}",
            f"ranges  {self.probe.ranges}",
            f"paths   from the base to {', '.join(self.ends)}, {len(self.path_points)} points each",
            f"plane   {plane}",
            f"cost    {passes:,} forward passes of a sample: some {seconds:.0f} s",
        ]

    def cost(self) -> Cost:
        """Return the points of all paths and of the plane, and the time."""
        points = len(self.ends) * len(self.path_points) + len(self.plane_points)
        batches = points * self.options.samples * len(self.probe.ranges) / BATCH
        return Cost(steps=points, seconds=self.seconds * batches)

    def run(self, progress: Progress = silent) -> LandscapeResult:
        """Measure, and write the folder if one is named."""
        options, before, steps = self.options, 0, self.cost().steps

        def count(done: int, total: int, text: str = "") -> None:
            progress(before + done, steps, text)

        paths: dict[str, Landscape] = {}
        for name, end in self.ends.items():
            paths[name] = measure_landscape(self.probe, [end], self.path_points, count)
            before += len(self.path_points)
        plane = None
        if self.pair:
            pair = [self.experts[label] for label in self.pair]
            plane = measure_landscape(self.probe, pair, self.plane_points, count)
        chosen = {"points": options.points, "samples": options.samples}
        record = {"inputs": dict(self.inputs), "options": chosen, "seed": options.seed}
        record["versions"] = versions("demerge", "torch", "diffusers")
        labels = tuple(self.experts)
        result = LandscapeResult(labels, self.vectors, paths, self.pair, plane, record, options.out)
        return result if options.out is None else replace(result, files=result.save(options.out))


def plan(options: LandscapeOptions) -> LandscapePlan:
    """Load what is compared, and check it before anything is measured.

    Raises:
        UsageError: if an option is wrong, `out` exists, or the experts' ranges are not a partition.
        InputError: if a model or the data cannot be read, or an expert does not fit the base.
    """
    if options.out is not None:
        check_is_new(place_for(options.out))
    K = len(options.experts)
    pair = None if options.plane == "auto" else _parse_pair(options.plane, K)
    merged = [options.merged] if options.merged is not None else []
    opened = open_experts(options.base, [*options.experts, *merged])
    model = Diffusion.load(
        options.base,
        device=resolve_device(options.device),
        resolution=options.resolution,
        pairs=False,
    )
    ranges = opened.find_ranges(options.ranges, model.T, experts=K)
    images = model.load_images(options.data, split=options.split, skip_broken=options.skip_broken)
    model.describe_condition(images)
    labels = _labels(opened.spans[:K], options.experts)
    sources = opened.describe_models()
    pairs = zip(sources[:K], labels, strict=True)
    inputs = {
        "base": opened.describe_base(),
        "experts": [{"path": s["path"], "label": x, "sha256": s["sha256"]} for s, x in pairs],
        "merged": sources[K] if merged else None,
        **opened.describe_data(images, options.split, ranges),
    }
    experts = dict(zip(labels, opened.models[:K], strict=True))
    ends = {Path(merged[0]).name: opened.models[K]} if merged else experts
    vectors = compare_task_vectors(opened.base, opened.models[:K])
    pair = _least_alike(vectors) if pair is None else pair
    names = tuple(labels[k] for k in pair)
    settings = {"samples": options.samples, "seed": options.seed, "batch_size": BATCH}
    probe = Probe(model=model, data=images, ranges=ranges, **settings)
    for n in (BLOCKS, BATCH):  # the first run warms up
        start = time.perf_counter()
        replace(probe, ranges=Partition.uniform(model.T, 1), samples=n).measure(model)
    seconds, notes = time.perf_counter() - start, opened.notes
    return LandscapePlan(options, probe, vectors, experts, ends, names, inputs, notes, seconds)


def _parse_pair(text: str, K: int) -> tuple[int, ...]:
    """Read the numbers of the experts of a plane; none for `none`."""
    if text == "none":
        return ()
    if re.fullmatch(r"\d+,\d+", text, re.ASCII) is None:
        fix = "give their numbers from 0 on, as 0,1, or auto or none"
        raise UsageError(f"plane '{text}' does not name two experts", fix=fix)
    i, j = map(int, text.split(","))
    if i == j or max(i, j) >= K:
        count = "1 is given" if K == 1 else f"{K} are given"
        fix = f"give two of 0..{K - 1}" if K > 1 else "name a second expert, or give --plane none"
        raise UsageError(f"plane '{text}' takes two different experts, and {count}", fix=fix)
    return i, j


def _least_alike(vectors: TaskVectors) -> tuple[int, ...]:
    """Return the two experts of the least cosine; none for one expert."""
    K = vectors.gram.shape[1]
    pairs = sorted(combinations(range(K), 2), key=lambda pair: pair[1])
    cosine = np.nan_to_num(vectors.cosine, nan=0.0)  # of an expert that is the base
    return min(pairs, key=lambda pair: float(cosine[pair]), default=())


def _labels(spans: Sequence[TimestepRange | None], paths: Sequence[str]) -> tuple[str, ...]:
    """Return the experts' ranges, or the names of their folders if ranges are not distinct."""
    folders = [Path(path).name for path in paths]
    names = [str(span) if span else name for span, name in zip(spans, folders, strict=True)]
    if len(set(names)) < len(names):
        names = folders
    if len(set(names)) < len(names):
        names = [f"{i}: {name}" for i, name in enumerate(names)]
    return tuple(names)


def _best_points(landscape: Landscape) -> Iterator[tuple[str, pd.DataFrame, Any]]:
    """Yield each range with its rows and the row of its lowest loss."""
    table = landscape.table()
    for span in landscape.ranges:
        rows = table[table.range == span]
        yield span, rows, rows.sort_values("change", kind="stable").iloc[0]


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = table.to_dict("records")
    return [{str(name): _plain(value) for name, value in row.items()} for row in rows]


def _plain(value: Any) -> Any:
    """Return a JSON value: lists for arrays, None for what is not finite."""
    if isinstance(value, np.ndarray):
        return [_plain(each) for each in value]
    if isinstance(value, str | int):
        return value
    return float(value) if math.isfinite(value) else None


def _format(row: Any) -> str:
    """Return a change with half of its 95 % interval."""
    half = t_quantile(BLOCKS) * row.se
    return f"{row.change:+.2%} ± {half:.2%}{'' if abs(row.change) > half else ' (covers 0)'}"
