"""The stage `demerge landscape`: task vectors compared, and held-out losses around the base, on paths and on a plane of two.

    paths     from the base to a merged model; without one, to each expert, s = 0, 1/P .. 3/2
    plane     of the two experts whose task vectors agree least, coefficients -1/P, 0, 1/P .. 1 + 1/P each

P is `points`, the steps from the base to an expert. Losses are of the test split by default, which experts have not seen. The
ranges are the experts' own where these make a partition, as finetuning leaves them; then layers by experts is layers by ranges.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from demerge.analysis.experts.landscape import Landscape, Progress, loss_path, loss_plane
from demerge.analysis.experts.records import measured_on, settled_ranges, sha256_of
from demerge.analysis.experts.task_vectors import TaskVectors, task_vectors
from demerge.analysis.similarity import t_quantile
from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.evaluation.metrics.range_losses import BLOCKS, range_losses
from demerge.expert import find_expert_range
from demerge.lora import open_expert
from demerge.merging.engine.validation import check_same_tensors
from demerge.merging.inputs.components import notes_about
from demerge.merging.inputs.experts import Expert, check_same_base
from demerge.provenance import versions
from demerge.storage.atomic import check_is_new, commit_dir, commit_json, commit_text, place_for
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.layout import CheckpointLocation
from demerge.timesteps import Partition

FORMAT = "demerge.landscape/1"
AUTO, NONE = "auto", "none"
BATCH = 64


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What was found around a base.

    Attributes:
        labels: of the experts, their ranges where they have some.
        paths: by the name of the model each leads to.
        pair: the places of the plane's experts.
    """

    labels: tuple[str, ...]
    vectors: TaskVectors
    paths: Mapping[str, Landscape]
    pair: tuple[int, int] | None
    plane: Landscape | None


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a survey takes."""

    model: Diffusion
    data: ImageData
    ranges: Partition
    base: Checkpoint
    experts: Sequence[Expert]
    labels: tuple[str, ...]
    merged: tuple[str, Expert] | None
    asked: tuple[int, int] | str
    points: int
    samples: int
    seed: int
    inputs: Mapping[str, Any]

    @cached_property
    def vectors(self) -> TaskVectors:
        """The task vectors of the experts."""
        return task_vectors(self.base, self.experts)

    @property
    def scales(self) -> list[float]:
        """The points of a path."""
        return [i / self.points for i in range(self.points + math.ceil(self.points / 2) + 1)]

    @property
    def steps(self) -> list[float]:
        """The coefficients of the plane's experts."""
        return [i / self.points for i in range(-1, self.points + 2)]

    @property
    def ends(self) -> dict[str, Expert]:
        """The models that paths lead to, by name."""
        return (
            {self.merged[0]: self.merged[1]}
            if self.merged
            else dict(zip(self.labels, self.experts, strict=True))
        )

    @cached_property
    def pair(self) -> tuple[int, int] | None:
        """The experts of the plane: those asked for, or the two of the least cosine; None for no plane."""
        if not isinstance(self.asked, str):
            return self.asked
        if self.asked == NONE or len(self.experts) < 2:
            return None
        pairs = [(i, j) for j in range(len(self.experts)) for i in range(j)]
        cosine = np.nan_to_num(self.vectors.cosine, nan=0.0)  # of an expert that is the base
        return min(pairs, key=lambda pair: float(cosine[pair]))

    @property
    def points_measured(self) -> int:
        """Points of all paths and of the plane."""
        return len(self.ends) * len(self.scales) + (len(self.steps) ** 2 if self.pair else 0)

    @property
    def passes(self) -> int:
        """Samples that are sent through a model."""
        return self.points_measured * self.samples * len(self.ranges)

    def seconds(self) -> float:
        """Estimate what `run` takes, by a probe of one batch."""
        whole = Partition.uniform(self.model.T, 1)
        for n in (BLOCKS, BATCH):
            start = time.perf_counter()
            range_losses(self.model, self.data, whole, samples=n, batch_size=BATCH)
        return (time.perf_counter() - start) * self.passes / BATCH

    def lines(self) -> list[str]:
        """Return the plan and its cost for a person."""
        told = self.model.describe_condition(self.data)
        pair = "none" if self.pair is None else " and ".join(self.labels[k] for k in self.pair)
        return [
            *(
                f"note    {path} was trained on these very images"
                for path in self.inputs["trained_on"]
            ),
            *(
                f"note    {note}"
                for note in notes_about(self.base, [*self.experts, *(self.merged or ())[1:]])
            ),
            f"data    {self.data.name}, {self.data.split}: {len(self.data):,} images"
            + (f"; {told}" if told else ""),
            f"ranges  {self.ranges}",
            f"paths   from the base to {', '.join(self.ends)}, {len(self.scales)} points each",
            f"plane   {pair}"
            + (f", {len(self.steps)} x {len(self.steps)} points" if self.pair else ""),
            f"cost    {self.passes:,} forward passes of a sample: some {self.seconds():.0f} s",
        ]

    def run(self, progress: Progress | None = None) -> Survey:
        """Measure; progress(done, total, what) counts points.

        Raises:
            NumericalError: where a loss is not finite.
        """
        common: dict[str, Any] = {"samples": self.samples, "seed": self.seed, "batch_size": BATCH}
        before = 0

        def counted(done: int, _: int, what: str) -> None:
            if progress is not None:
                progress(before + done, self.points_measured, what)

        paths = {}
        for name, end in self.ends.items():
            paths[name] = loss_path(
                self.model,
                end,
                self.data,
                self.ranges,
                scales=self.scales,
                progress=counted,
                **common,
            )
            before += len(self.scales)
        plane = None
        if self.pair is not None:
            i, j = (self.experts[k] for k in self.pair)
            plane = loss_plane(
                self.model,
                i,
                j,
                self.data,
                self.ranges,
                steps=self.steps,
                progress=counted,
                **common,
            )
        return Survey(self.labels, self.vectors, paths, self.pair, plane)

    def record(self) -> dict[str, Any]:
        """Return inputs, options, seed and versions as JSON values."""
        options = {"points": self.points, "samples": self.samples}
        said = {"inputs": dict(self.inputs), "options": options, "seed": self.seed}
        return {**said, "versions": versions("demerge", "torch", "diffusers")}


def prepare(
    base: str,
    experts: Sequence[str],
    data: str,
    out: Path | str | None = None,
    *,
    merged: str | None = None,
    ranges: str | None = None,
    plane: str = AUTO,
    points: int = 4,
    samples: int = 128,
    split: str = "test",
    skip_broken: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Plan:
    """Load what is compared, and check it before anything is measured.

    Args:
        ranges: uniform:N, joint or a partition.json; the experts' own where None.
        plane: two places among the experts from 0 on, as 0,3; auto for the two that agree least, where there are two; none.

    Raises:
        UsageError: where an argument is wrong, `out` exists, or the experts have no ranges that make a partition.
        InputError: where a model or the data cannot be read, or an expert does not fit the base.
    """
    out = None if out is None else place_for(out)
    if out is not None:
        check_is_new(out)
    if points < 1 or samples < BLOCKS:
        raise UsageError(
            f"{points} points and {samples} samples are too few",
            fix=f"give at least 1 and {BLOCKS}",
        )
    asked = _pair(plane, len(experts))
    origin = Checkpoint.open(base)
    paths = [*experts, *([merged] if merged is not None else [])]
    opened = [open_expert(path, origin) for path in paths]
    check_same_base(origin, opened)
    check_same_tensors(origin, opened, [base, *paths])
    tuned = opened[: len(experts)]
    model = Diffusion.load(base, device=device)
    partition = settled_ranges(ranges, model.T, [base, *paths], [origin, *opened], tuned)
    images = model.load_images(data, split=split, skip_broken=skip_broken)
    model.describe_condition(images)
    labels = _labels(experts, [expert.place for expert in tuned])
    end = None if merged is None else (Path(merged).name, opened[-1])
    inputs = {
        "base": {"path": base, "sha256": sha256_of(origin)},
        "experts": _hashed(experts, tuned, labels),
        "merged": None if merged is None else {"path": merged, "sha256": sha256_of(opened[-1])},
        **measured_on(images, split, partition, paths, opened),
    }
    return Plan(
        model, images, partition, origin, tuned, labels, end, asked, points, samples, seed, inputs
    )


def _pair(text: str, K: int) -> tuple[int, int] | str:
    """Read the experts of a plane."""
    if text in (AUTO, NONE):
        return text
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() for word in words) or len(words) != 2:
        raise UsageError(
            f"plane '{text}' names no two experts",
            fix="give their places from 0 on, as 0,1, or auto or none",
        )
    i, j = map(int, words)
    if i == j or max(i, j) >= K:
        raise UsageError(
            f"plane '{text}' takes two different experts, and {K} {'is' if K == 1 else 'are'} given",
            fix=f"give two of 0..{K - 1}"
            if K > 1
            else "name a second expert, or leave the plane out: --plane none",
        )
    return i, j


def _labels(paths: Sequence[str], places: Sequence[CheckpointLocation]) -> tuple[str, ...]:
    """Return what experts are called: their ranges, the names of their folders where ranges are missing or not distinct."""
    spans = [find_expert_range(place) for place in places]
    names = [
        str(span) if span else Path(path).name for span, path in zip(spans, paths, strict=True)
    ]
    if len(set(names)) < len(names):
        names = [Path(path).name for path in paths]
    return (
        tuple(names)
        if len(set(names)) == len(names)
        else tuple(f"{i}: {name}" for i, name in enumerate(names))
    )


def _hashed(
    paths: Sequence[str], experts: Sequence[Expert], labels: Sequence[str]
) -> list[dict[str, str]]:
    return [
        {"path": path, "label": label, "sha256": sha256_of(expert)}
        for path, expert, label in zip(paths, experts, labels, strict=True)
    ]


# -- what is said -----------------------------------------------------------------------------------------------------------


def document(found: Survey, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return all of it as JSON values; what is not defined, as the cosine of a vector of length 0, is null."""
    vectors, labels = found.vectors, found.labels
    parts = {"blocks": vectors.by_block(), "layers": vectors.by_layer()}
    compared = {
        "labels": list(labels),
        "norms": _plain(np.sqrt(np.diagonal(vectors.gram.sum(0)))),
        "cosine": _plain(vectors.cosine),
        "sign_conflict": _plain(vectors.sign_conflict),
        "effective_rank": vectors.effective_rank,
        **{
            name: _rows(part.table(labels).rename_axis("name").reset_index())
            for name, part in parts.items()
        },
    }
    return {
        "format": FORMAT,
        "task_vectors": compared,
        "paths": {name: _rows(path.table()) for name, path in found.paths.items()},
        "plane": None
        if found.plane is None or found.pair is None
        else _of_plane(found, found.plane, found.pair),
        "record": dict(record),
    }


def _of_plane(found: Survey, plane: Landscape, pair: tuple[int, int]) -> dict[str, Any]:
    return {"experts": [found.labels[k] for k in pair], "points": _rows(plane.table())}


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(name): _plain(value) for name, value in row.items()}
        for row in table.to_dict("records")
    ]


def _plain(value: Any) -> Any:
    """Return a JSON value: lists for arrays, None for what is not finite."""
    if isinstance(value, np.ndarray):
        return [_plain(each) for each in value]
    if isinstance(value, str | int):
        return value
    return float(value) if math.isfinite(value) else None


def lines(found: Survey) -> list[str]:
    """Return what was found for a person."""
    return [*_compared(found), *_along(found), *_on_plane(found)]


def _compared(found: Survey) -> Iterator[str]:
    vectors, labels = found.vectors, [label[:12] for label in found.labels]
    blocks = vectors.by_block()
    table = blocks.table(found.labels)
    yield (
        f"{'length by block':16s}"
        + "".join(f"{label:>13s}" for label in labels)
        + "   cosine  opposed  rank"
    )
    for name, norms, row in zip(blocks.names, blocks.norms, table.itertuples(), strict=True):
        shares = f"   {row.cosine:6.2f}  {row.sign_conflict:7.0%}  {row.effective_rank:4.1f}"
        yield f"{name[:16]:16s}" + "".join(f"{norm:13.4g}" for norm in norms) + shares
    norms = np.sqrt(np.diagonal(vectors.gram.sum(0)))
    yield (
        f"{'whole':16s}"
        + "".join(f"{norm:13.4g}" for norm in norms)
        + f"{'':19s}  {vectors.effective_rank:4.1f}"
    )
    for name, values, form in (
        ("cosine", vectors.cosine, ".2f"),
        ("opposed", vectors.sign_conflict, ".0%"),
    ):
        for k in range(1, len(labels)):
            yield f"{name:8s}{labels[k]:12s}" + "".join(
                f"  {labels[n]} {values[k, n]:{form}}" for n in range(k)
            )


def _along(found: Survey) -> Iterator[str]:
    for name, path in found.paths.items():
        table = path.table()
        for span in path.ranges:
            rows = table[table.range == span]
            end, best = rows[rows.s == 1].iloc[0], rows.sort_values("change", kind="stable").iloc[0]
            lowest = f"lowest at s = {best.s:g}: {_told(best)}" if best.s else "lowest at the base"
            yield f"path to {name[:20]:12s}  loss in {span}: {_told(end)}, {lowest}"


def _on_plane(found: Survey) -> Iterator[str]:
    if found.plane is None or found.pair is None:
        return
    table, names = found.plane.table(), [found.labels[k] for k in found.pair]
    for span in found.plane.ranges:
        rows = table[table.range == span]
        best = rows.sort_values("change", kind="stable").iloc[0]
        place = f"{best.w_i:g} {names[0]} {best.w_j:+g} {names[1]}"
        yield f"plane {' x '.join(names)}  loss in {span}: lowest at {place}: {_told(best)}"
    yield "lowest points were picked on these very images; what they promise is a little too good"


def _told(row: Any) -> str:
    """Return a change with the half width of its 95 % interval."""
    half = t_quantile(BLOCKS) * row.se
    return f"{row.change:+.2%} ± {half:.2%}{'' if abs(row.change) > half else ' (covers 0)'}"


def figures(found: Survey) -> dict[str, Figure]:
    """Return the plots by the name of their file."""
    from demerge.analysis.experts.plots import (
        loss_along_path,
        loss_on_plane,
        norms_by_block,
        norms_by_layer,
    )

    drawn = {
        "norms_by_block": norms_by_block(found.vectors, found.labels),
        "norms_by_layer": norms_by_layer(found.vectors, found.labels),
    }
    for i, (name, path) in enumerate(found.paths.items()):
        drawn["loss_along_path" if len(found.paths) == 1 else f"loss_along_path_{i}"] = (
            loss_along_path(path, name)
        )
    if found.plane is not None and found.pair is not None:
        drawn["loss_on_plane"] = loss_on_plane(found.plane, [found.labels[k] for k in found.pair])
    return drawn


def write(found: Survey, made: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the document, tables of blocks and layers, and plots into the new folder OUT, whole or absent; return its files."""
    from demerge.reporting.theme import save_figure

    with commit_dir(out) as folder:
        commit_json(folder / "landscape.json", made)
        for name, part in (
            ("blocks", found.vectors.by_block()),
            ("layers", found.vectors.by_layer()),
        ):
            commit_text(
                folder / f"{name}.csv",
                part.table(found.labels).rename_axis("name").to_csv(lineterminator="\n"),
            )
        for name, figure in figures(found).items():
            save_figure(figure, folder, name)
    return sorted(out.iterdir())
