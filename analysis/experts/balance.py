"""The stage `demerge coefficients`: base, experts, data and ranges checked, cost known, then weights for a merge.

The ranges are the experts' own where these make a partition, as finetuning leaves them. The loss is taken on the train
split by default, so that images which judge the merge have not chosen its weights; the experts have seen that split, and the
prediction says so. With the test split the prediction is sharper, and what is then reported should come from other images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from demerge.analysis.experts.coefficients import Change, Coefficients, coefficients
from demerge.analysis.experts.responses import BATCH, Draws, Progress, bend, bytes_held, passes, responses
from demerge.data import load_images
from demerge.diffusion import Diffusion
from demerge.errors import UsageError
from demerge.files import refuse_existing
from demerge.hashes import remembered_content
from demerge.headers import read_json
from demerge.lora import open_expert
from demerge.merge import MergeSession
from demerge.merge.sources import Expert, expert_range, refuse_foreign
from demerge.places import Place
from demerge.records import installed
from demerge.timesteps import Partition
from demerge.weights import Checkpoint, content_sha256

PER = ("model", "block")


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Everything one solution takes."""

    draws: Draws
    session: MergeSession
    options: Mapping[str, Any]
    inputs: Mapping[str, Any]

    @property
    def passes(self) -> int:
        """Samples that are sent through a model."""
        return passes(self.draws, math.prod(self.session.shape))

    def seconds(self) -> float:
        """Estimate what `run` takes, by a probe of one batch."""
        cell = next(self.draws.cells(self.draws.ranges[0], 0, 0, BATCH))
        start = time.perf_counter()
        self.draws.model.predict(cell.x_t, cell.t, cell.condition)
        return (time.perf_counter() - start) * self.passes / len(cell.t)

    def lines(self) -> list[str]:
        """Return the plan and its cost for a person."""
        draws, P = self.draws, math.prod(self.session.shape)
        held = (self.session.bytes + bytes_held(draws, P)) / 1e6
        note = "note    experts were trained on these very images: the prediction is too good by what they remember"
        return [
            *([note] if self.inputs["trained_on"] else []),
            f"data    {draws.data.name}, {draws.data.split}: {len(draws.data):,} images in {draws.groups} groups",
            f"ranges  {draws.ranges}",
            f"cost    {self.passes:,} samples through the model for {P} weights: some {self.seconds():.0f} s, {held:.0f} MB",
        ]

    def run(self, progress: Progress | None = None) -> Coefficients:
        """Measure and solve.

        Raises:
            NumericalError: where an output is not finite.
        """
        found = responses(self.draws, self.session, step=self.options["step"], progress=progress)
        bent = partial(bend, self.draws, self.session, found)
        return coefficients(found, ridge=self.options["ridge"], relative=self.options["relative"], bend=bent)

    def record(self) -> dict[str, Any]:
        """Return inputs, options, seed and versions as JSON values."""
        versions = {name: installed(name) for name in ("demerge", "torch", "diffusers")}
        return {"inputs": dict(self.inputs), "options": dict(self.options), "seed": self.draws.seed, "versions": versions}


def prepare(
    base: str,
    experts: Sequence[str],
    data: str,
    out: Path,
    *,
    ranges: str | None = None,
    per: str = "model",
    samples: int = 512,
    groups: int = 16,
    ridge: float | None = None,
    relative: bool = False,
    step: float = 1.0,
    split: str = "train",
    skip_broken: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Plan:
    """Load what the weights are found from, and check it before anything is measured.

    Args:
        ranges: uniform:N, joint or a partition.json; the experts' own where None.

    Raises:
        UsageError: where an argument is wrong or the experts have no ranges that make a partition.
        InputError: where a model or the data cannot be read, or the experts do not fit the base, or `out` exists.
        ResourceError: where memory does not suffice.
    """
    if out.suffix != ".json":
        raise UsageError(f"{out} is no name for a file of weights", fix="end it in .json")
    refuse_existing(out)
    if per not in PER:
        raise UsageError(f"per '{per}' is unknown", fix=f"use {' or '.join(PER)}")
    origin = Checkpoint.open(base)
    tuned = [open_expert(path, origin) for path in experts]
    refuse_foreign(origin, tuned)
    model = Diffusion.load(base, device=device)
    partition = Partition.parse(ranges, model.T) if ranges is not None else _own([e.place for e in tuned], model.T)
    channels, height, _ = model.image_shape
    images = load_images(data, split=split, resolution=height, channels=channels, skip_broken=skip_broken)
    draws = Draws(model, images, partition, samples, groups, seed)
    session = MergeSession(origin, tuned, device, groups="blocks" if per == "block" else None)
    inputs = {
        "base": {"path": base, "sha256": _sha256(origin)},
        "experts": [{"path": path, "sha256": _sha256(found)} for path, found in zip(experts, tuned, strict=True)],
        "data": images.name,
        "data_fingerprint": images.fingerprint,
        "split": split,
        "trained_on": [path for path, e in zip(experts, tuned, strict=True) if _data_of(e.place) == images.fingerprint],
        "ranges": [[span.start, span.stop] for span in partition],
    }
    options = {"per": per, "samples": samples, "groups": groups, "ridge": ridge, "relative": relative, "step": step}
    return Plan(draws, session, options, inputs)


def _data_of(place: Place) -> Any:
    """Return the fingerprint of the data that an expert's record says it was trained on."""
    record = place.beside("expert.json")
    inputs = read_json(record).get("inputs") if record is not None else None
    return inputs.get("data_fingerprint") if isinstance(inputs, dict) else None


def _sha256(model: Expert) -> str:
    """Return the hash of a model's tensors, or of the deltas that a LoRA stands for."""
    return remembered_content(model) if isinstance(model, Checkpoint) else content_sha256(model)


def _own(places: Sequence[Place], T: int) -> Partition:
    """Return the partition that the experts' ranges make.

    Raises:
        UsageError: where they make none.
    """
    spans = sorted(span for place in places if (span := expert_range(place)))
    try:
        partition = Partition(tuple(dict.fromkeys(spans)))
    except UsageError as error:
        raise UsageError(f"the experts' ranges make no partition: {error.what}", fix="give --ranges, e.g. uniform:4") from error
    if partition.total != T:
        raise UsageError(f"the experts' ranges {partition} do not cover [0, {T})", fix="give --ranges, for example uniform:4")
    return partition


# -- what is said -----------------------------------------------------------------------------------------------------------


def document(made: Coefficients, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file of weights that `demerge merge --weights` takes; per block, the model's are the blocks' mean."""
    blocks = made.responses.blocks
    weights = {"weights": (made.w.mean(0) if blocks else made.w).tolist()}
    parts = {"blocks": dict(zip(blocks, made.w.tolist(), strict=True))} if blocks else {}
    loss = {str(span): float(mean) for span, mean in zip(made.responses.ranges, made.responses.loss.mean(1), strict=True)}
    said = {
        "ridge": made.ridge,
        "base_loss": loss,
        "predicted": made.predicted.document(),
        "fitted": made.fitted,
        "bend": made.bend.document(),
        "average": made.average.document(),
        "against_average": made.gained.document(),
    }
    return {"format": "demerge.coefficients/1", **weights, **parts, "record": {**record, **said}}


def lines(made: Coefficients) -> list[str]:
    """Return what was found for a person."""
    found = made.responses
    rows = [
        f"{span}  {loss:9.5f}  {_told(made.predicted.ranges[str(span)])}  {_told(made.average.ranges[str(span)])}"
        for span, loss in zip(found.ranges, found.loss.mean(1), strict=True)
    ]
    names = found.blocks or ("weights",)
    return [
        f"{'range':9s}  {'base loss':>9s}  {'predicted change':28s}  1/K each",
        *rows,
        f"{'all':20s}  {_told(made.predicted.total)}  {_told(made.average.total)}",
        *(f"{name:9s}  {' '.join(f'{w:7.3f}' for w in row)}" for name, row in zip(names, np.atleast_2d(made.w), strict=True)),
        f"ridge      {made.ridge:g}",
        f"bend       {made.bend}: measured at these weights, beyond what the closed form sees",
        *verdict(made),
    ]


def verdict(made: Coefficients) -> list[str]:
    """Return what is promised of the weights, and what is not."""
    total, gained = made.predicted.total, made.gained
    interval = f"{total.value - total.half:+.2%} to {total.value + total.half:+.2%} (95 %)"
    if not total.sure:
        first = f"no promise: the change of the loss over all ranges, {interval}, covers 0; the base may be as good"
    elif total.value < 0:
        first = f"promised: the loss over all ranges changes by {interval}"
    else:
        first = f"worse: the loss over all ranges changes by {interval}; keep the base"
    better = "better than" if gained.value < 0 else "worse than"
    second = f"{better} 1/K each by {gained}" if gained.sure else f"no promise that they beat 1/K each: {gained}"
    return [first, second, "loss does not rank models as images do: compare by `demerge evaluate` before you believe it"]


def _told(change: Change) -> str:
    return f"{change!s:18s} {'' if change.sure else 'covers 0':9s}"
