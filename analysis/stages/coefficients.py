"""The stage `demerge coefficients`: base, experts, data and ranges checked, cost known, then weights for a merge.

The ranges are the experts' own where these make a partition, as finetuning leaves them. The loss is taken on the train
split by default, so that images which judge the merge have not chosen its weights; the experts have seen that split, and the
prediction says so. With the test split the prediction is sharper, and what is then reported should come from other images.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from demerge.analysis.experts.coefficients import INTERVAL, Change, Coefficients, coefficients
from demerge.analysis.experts.records import measured_on, settled_ranges, sha256_of
from demerge.analysis.experts.responses import (
    BATCH,
    Draws,
    Progress,
    bend,
    bytes_held,
    merges,
    passes,
    responses,
)
from demerge.conflict import layer_of
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.lora import open_expert
from demerge.merging import MergeSession
from demerge.merging.inputs.experts import check_same_base
from demerge.merging.recipe.blocks import KINDS
from demerge.provenance import versions
from demerge.storage.atomic import check_is_new, place_for
from demerge.storage.checkpoint import Checkpoint

PER = ("model", "block", "layer")
SHOWN = 16


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
        """Estimate what `run` takes, by a probe of one batch and one merge."""
        cell, model = (
            next(self.draws.cells(self.draws.ranges[0], 0, 0, BATCH)),
            copy.deepcopy(self.draws.model.denoiser),
        )
        start = time.perf_counter()
        self.draws.model.predict(cell.x_t, cell.t, cell.condition)
        predicted = time.perf_counter()
        self.session.apply(0.5, model)
        merged = time.perf_counter() - predicted
        return (predicted - start) * self.passes / len(cell.t) + merged * merges(
            self.draws, math.prod(self.session.shape)
        )

    def lines(self) -> list[str]:
        """Return the plan and its cost for a person."""
        draws, P = self.draws, math.prod(self.session.shape)
        held = (self.session.bytes + bytes_held(draws, P)) / 1e6
        told = draws.model.describe_condition(draws.data)
        note = "note    experts were trained on these very images: the prediction is too good by what they remember"
        return [
            *([note] if self.inputs["trained_on"] else []),
            *(f"note    {note}" for note in self.session.notes),
            f"data    {draws.data.name}, {draws.data.split}: {len(draws.data):,} images in {draws.groups} groups",
            *([f"given   {told}"] if told else []),
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
        return coefficients(
            found, ridge=self.options["ridge"], relative=self.options["relative"], bend=bent
        )

    def record(self) -> dict[str, Any]:
        """Return inputs, options, seed and versions as JSON values."""
        said = {"inputs": dict(self.inputs), "options": dict(self.options), "seed": self.draws.seed}
        return {**said, "versions": versions("demerge", "torch", "diffusers")}


def prepare(
    base: str,
    experts: Sequence[str],
    data: str,
    out: Path | str,
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
        per: what has weights of its own: `model`, `block`, or `layer`, a module with tensors of its own.

    Raises:
        UsageError: where an argument is wrong, `out` exists, or the experts have no ranges that make a partition.
        InputError: where a model or the data cannot be read, or the experts do not fit the base.
        ResourceError: where memory does not suffice.
    """
    out = place_for(out)
    if out.suffix != ".json":
        raise UsageError(f"{out} is not a name for a file of weights", fix="end it in .json")
    check_is_new(out)
    if per not in PER:
        raise UsageError(f"per '{per}' is unknown", fix=f"use {', '.join(PER)}")
    origin = Checkpoint.open(base)
    tuned = [open_expert(path, origin) for path in experts]
    check_same_base(origin, tuned)
    model = Diffusion.load(base, device=device)
    partition = settled_ranges(ranges, model.T, [base, *experts], [origin, *tuned], tuned)
    images = model.load_images(data, split=split, skip_broken=skip_broken)
    draws = Draws(model, images, partition, samples, groups, seed)
    session = MergeSession(origin, tuned, device, groups=_groups(per, model.denoiser))
    inputs = {
        "base": {"path": base, "sha256": sha256_of(origin)},
        "experts": [
            {"path": path, "sha256": sha256_of(found)}
            for path, found in zip(experts, tuned, strict=True)
        ],
        **measured_on(images, split, partition, experts, tuned),
    }
    options = {
        "per": per,
        "samples": samples,
        "groups": groups,
        "ridge": ridge,
        "relative": relative,
        "step": step,
    }
    return Plan(draws, session, options, inputs)


def _groups(per: str, denoiser: nn.Module) -> Literal["blocks"] | Sequence[str] | None:
    """Return what has weights of its own, as a merge session takes it."""
    return {"model": None, "block": "blocks", "layer": layers(denoiser)}[per]


def layers(denoiser: nn.Module) -> list[str]:
    """Return the patterns of the layers, modules with tensors of their own; what holds other layers comes after these."""
    names = [name for name, tensor in denoiser.state_dict().items() if tensor.is_floating_point()]
    found = list(dict.fromkeys(map(layer_of, names)))
    holding = {layer.rsplit(".", i)[0] for layer in found for i in range(1, layer.count(".") + 1)}
    nested = sorted(
        (layer for layer in found if layer in holding), key=lambda layer: -layer.count(".")
    )
    chosen = [layer for layer in found if layer not in holding] + nested
    return [f"{layer}.*" if layer in KINDS else layer for layer in chosen]


# -- what is said -----------------------------------------------------------------------------------------------------------


def document(made: Coefficients, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file of weights that `demerge merge --weights` takes; the model's are the mean of its blocks or layers."""
    blocks = made.responses.blocks
    weights = {"weights": (made.w.mean(0) if blocks else made.w).tolist()}
    parts = {"blocks": dict(zip(blocks, made.w.tolist(), strict=True))} if blocks else {}
    loss = {
        str(span): float(mean)
        for span, mean in zip(made.responses.ranges, made.responses.loss.mean(1), strict=True)
    }
    said = {
        "ridge": made.ridge,
        "base_loss": loss,
        "predicted": made.predicted.document(),
        "fitted": made.fitted,
        "bend": made.bend.document(),
        "average": made.average.document(),
        "against_average": made.gained.document(),
        "outside": {
            "interval": list(INTERVAL),
            "weights": [
                {"block": block or None, "expert": k, "weight": w} for block, k, w in made.outside
            ],
            "ridge": made.calm if made.outside else None,
        },
    }
    return {"format": "demerge.coefficients/1", **weights, **parts, "record": {**record, **said}}


def lines(made: Coefficients) -> list[str]:
    """Return what was found for a person."""
    found = made.responses
    rows = [
        f"{span}  {loss:9.5f}  {_told(made.predicted.ranges[str(span)])}  {_told(made.average.ranges[str(span)])}"
        for span, loss in zip(found.ranges, found.loss.mean(1), strict=True)
    ]
    return [
        f"{'range':9s}  {'base loss':>9s}  {'predicted change':28s}  1/K each",
        *rows,
        f"{'all':20s}  {_told(made.predicted.total)}  {_told(made.average.total)}",
        *_weights(made),
        *_outside(made),
        f"ridge      {made.ridge:g}",
        f"bend       {made.bend}: measured at these weights, beyond what the closed form sees",
        *verdict(made),
    ]


def _weights(made: Coefficients) -> list[str]:
    """Return the weights, or of many their spread over blocks or layers."""
    names, rows = made.responses.blocks or ("weights",), np.atleast_2d(made.w)
    if len(names) > SHOWN:
        names, rows = ("least", "median", "most"), np.quantile(rows, (0, 0.5, 1), axis=0)
    width = max(9, *(len(name) for name in names))
    told = [
        f"{name:{width}s}  {' '.join(f'{w:7.3f}' for w in row)}"
        for name, row in zip(names, rows, strict=True)
    ]
    return (
        told
        if len(made.responses.blocks) <= SHOWN
        else [f"of {len(made.responses.blocks)} layers:", *told]
    )


def _outside(made: Coefficients) -> list[str]:
    """Return, where there are weights outside of INTERVAL, how many, the farthest, and what a larger ridge would do."""
    if not made.outside:
        return []
    block, k, w = made.outside[0]
    which = f"{w:.3g} of expert {k}{f' at {block}' if block else ''}"
    ridge = (
        f"a --ridge above {made.ridge:g} shrinks them"
        if made.calm is None
        else f"--ridge {made.calm:g} brings all inside"
    )
    count = f"{len(made.outside)} of {made.w.size} weights lie outside [{INTERVAL[0]:g}, {INTERVAL[1]:g}]"
    return [
        f"outside    {count}, over a task vector from base and expert, the farthest {which}; {ridge}"
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
    second = (
        f"{better} 1/K each by {gained}"
        if gained.sure
        else f"no promise that they beat 1/K each: {gained}"
    )
    return [
        first,
        second,
        "loss does not rank models as images do: compare by `demerge evaluate` before you believe it",
    ]


def _told(change: Change) -> str:
    return f"{change!s:18s} {'' if change.sure else 'covers 0':9s}"
