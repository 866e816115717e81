"""The stage `demerge coefficients`: the weights of a merge, and what they are predicted to change.

The ranges are by default the experts' own, as finetuning leaves them. The loss is taken on the
train split by default, so that images which judge the merge have not chosen its weights. The
experts have seen that split, and the plan says so. With the test split the prediction is sharper;
then report scores on other images.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from demerge.analysis.experts.closed_form import INTERVAL, Change, Coefficients, solve_coefficients
from demerge.analysis.experts.inputs import open_experts
from demerge.analysis.experts.options import CoefficientsOptions
from demerge.analysis.experts.responses import BATCH, Draws, measure_bend, measure_responses
from demerge.conflict import layer_of
from demerge.device import resolve_device
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.merging import MergeSession
from demerge.merging.blocks import KINDS
from demerge.progress import Progress, silent
from demerge.provenance import versions
from demerge.stage import Cost
from demerge.storage.atomic import check_is_new, commit_json, place_for

SHOWN = 16


@dataclass(frozen=True, slots=True, eq=False)
class CoefficientsResult:
    """Weights, and the record of how they were found: inputs, options, seed, versions."""

    solution: Coefficients
    record: Mapping[str, Any]
    out: Path

    def document(self) -> dict[str, Any]:
        """Return the path and the content of the file as JSON values."""
        return {"out": str(self.out), **self.weights_file()}

    def weights_file(self) -> dict[str, Any]:
        """Return what `demerge merge --weights` reads; the model's are the mean of the blocks'."""
        made, responses = self.solution, self.solution.responses
        blocks, losses = responses.blocks, responses.loss.mean(1).tolist()
        weights: dict[str, Any] = {"weights": (made.w.mean(0) if blocks else made.w).tolist()}
        if blocks:
            weights["blocks"] = dict(zip(blocks, made.w.tolist(), strict=True))
        far = [{"block": b or None, "expert": k, "weight": w} for b, k, w in made.outside]
        ridge = made.inner_ridge if far else None
        solution = {
            "ridge": made.ridge,
            "base_loss": dict(zip(map(str, responses.ranges), losses, strict=True)),
            "predicted": made.predicted.document(),
            "fitted": made.fitted,
            "bend": made.bend.document(),
            "average": made.average.document(),
            "against_average": made.against_average.document(),
            "outside": {"interval": list(INTERVAL), "weights": far, "ridge": ridge},
        }
        record = {**self.record, **solution}
        return {"format": "demerge.coefficients/1", **weights, "record": record}

    def lines(self) -> list[str]:
        """Return the verdict, the changes of the ranges, and the weights."""
        made, losses = self.solution, self.solution.responses.loss.mean(1)
        head = f"{'range':9s}  {'base loss':>9s}  {'predicted change':28s}  1/K each"
        lines = [*self.verdict(), head]
        for (name, change), loss in zip(made.predicted.ranges.items(), losses, strict=True):
            average = _format(made.average.ranges[name])
            lines.append(f"{name}  {loss:9.5f}  {_format(change)}  {average}")
        total = f"{_format(made.predicted.total)}  {_format(made.average.total)}"
        lines += [f"{'all':20s}  {total}", *self._weights(), *self._outside()]
        bend = f"bend       {made.bend}: measured at these weights, beyond the closed form"
        return [*lines, f"ridge      {made.ridge:g}", bend]

    def verdict(self) -> list[str]:
        """Return whether a gain is predicted, and what to do."""
        total, average = self.solution.predicted.total, self.solution.against_average
        low, high = total.value - total.half, total.value + total.half
        change = f"the loss over all ranges changes by {low:+.2%} to {high:+.2%} (95 %)"
        if not total.is_resolved:
            first = f"no gain is predicted: {change}, which covers 0. The base may be as good."
        elif total.value < 0:
            first = f"a gain is predicted: {change}. Merge with --weights {self.out}."
        else:
            first = f"these weights harm: {change}. Keep the base."
        second = f"not distinguishable from 1/K each: {average}"
        if average.is_resolved:
            second = f"{'better' if average.value < 0 else 'worse'} than 1/K each by {average}"
        third = "Loss does not rank models as images do: compare them with `demerge evaluate`."
        return [first, second, third]

    def _weights(self) -> Iterator[str]:
        """Yield the weights; of many blocks or layers the least, the median and the most."""
        blocks, rows = self.solution.responses.blocks, np.atleast_2d(self.solution.w)
        names: Sequence[str] = blocks or ("weights",)
        if len(names) > SHOWN:
            yield f"of {len(names)} layers:"
            names, rows = ("least", "median", "most"), np.quantile(rows, (0, 0.5, 1), axis=0)
        width = max(9, *map(len, names))
        for name, row in zip(names, rows, strict=True):
            yield f"{name:{width}s}  {' '.join(f'{w:7.3f}' for w in row)}"

    def _outside(self) -> Iterator[str]:
        """Yield how many weights lie outside INTERVAL, and which ridge brings them inside."""
        made = self.solution
        if not made.outside:
            return
        block, k, w = made.outside[0]
        farthest = f"{w:.3g} of expert {k}{f' at {block}' if block else ''}"
        interval = f"[{INTERVAL[0]:g}, {INTERVAL[1]:g}]"
        count = f"{len(made.outside)} of {made.w.size} weights lie outside {interval}"
        ridge = f"a --ridge above {made.ridge:g} shrinks them"
        if made.inner_ridge is not None:
            ridge = f"--ridge {made.inner_ridge:g} brings all inside"
        yield f"outside    {count}, the farthest is {farthest}; {ridge}"


@dataclass(frozen=True, slots=True, eq=False)
class CoefficientsPlan:
    """What the weights are found from; `seconds` is estimated."""

    options: CoefficientsOptions
    draws: Draws
    session: MergeSession
    inputs: Mapping[str, Any]
    seconds: float

    def describe(self) -> list[str]:
        """Return notes, data, ranges and cost."""
        draws, data, cost = self.draws, self.draws.data, self.cost()
        seen = "the experts were trained on these images: the predicted gain is too large"
        condition, weights = draws.model.describe_condition(data), math.prod(self.session.shape)
        return [
            *([f"note    {seen}"] if self.inputs["trained_on"] else []),
            *(f"note    {note}" for note in self.session.notes),
            f"data    {data.name}, {data.split}: {len(data):,} images in {draws.groups} groups",
            *([f"input   {condition}"] if condition else []),
            f"ranges  {draws.ranges}",
            f"cost    {cost.steps:,} samples through the model for {weights} weights: "
            f"some {self.seconds:.0f} s, {(cost.memory or 0) / 1e6:.0f} MB",
        ]

    def cost(self) -> Cost:
        """Return the samples that go through the model, the time and the memory."""
        P = math.prod(self.session.shape)
        memory = self.session.bytes + self.draws.count_bytes(P)
        return Cost(steps=self.draws.count_passes(P), seconds=self.seconds, memory=memory)

    def run(self, progress: Progress = silent) -> CoefficientsResult:
        """Measure, solve, and write the file of weights."""
        options = self.options
        responses = measure_responses(
            self.draws, self.session, step=options.step, progress=progress
        )
        bend = partial(measure_bend, self.draws, self.session, responses)
        solution = solve_coefficients(
            responses, ridge=options.ridge, relative=options.relative, bend=bend
        )
        names = ("samples", "groups", "ridge", "relative", "step")
        chosen = {"per": options.granularity, **{name: getattr(options, name) for name in names}}
        record = {"inputs": dict(self.inputs), "options": chosen, "seed": options.seed}
        record["versions"] = versions("demerge", "torch", "diffusers")
        result = CoefficientsResult(solution, record, options.out)
        commit_json(options.out, result.weights_file())
        return result


def plan(options: CoefficientsOptions) -> CoefficientsPlan:
    """Load what the weights are found from, and check it before anything is measured.

    Raises:
        UsageError: if an option is wrong, `out` exists, or the experts' ranges are not a partition.
        InputError: if a model or the data cannot be read, or the experts do not fit the base.
        ResourceError: if memory is too small.
    """
    out = place_for(options.out)
    if out.suffix != ".json":
        raise UsageError(f"{out} is not a name for a file of weights", fix="end it in .json")
    check_is_new(out)
    opened = open_experts(options.base, options.experts)
    model = Diffusion.load(
        options.base,
        device=resolve_device(options.device),
        resolution=options.resolution,
        pairs=False,
    )
    ranges = opened.find_ranges(options.ranges, model.T)
    images = model.load_images(options.data, split=options.split, skip_broken=options.skip_broken)
    draws = Draws(model, images, ranges, options.samples, options.groups, options.seed)
    groups = merge_groups(options.granularity, model.denoiser)
    session = MergeSession(opened.base, opened.models, model.device, groups=groups)
    inputs = {
        "base": opened.describe_base(),
        "experts": opened.describe_models(),
        **opened.describe_data(images, options.split, ranges),
    }
    return CoefficientsPlan(options, draws, session, inputs, _seconds(draws, session))


def _seconds(draws: Draws, session: MergeSession) -> float:
    """Estimate the time of a run by one batch and one merge."""
    denoiser, P = copy.deepcopy(draws.model.denoiser), math.prod(session.shape)
    cell = next(draws.cells(draws.ranges[0], 0, 0, BATCH))
    start = time.perf_counter()
    draws.model.predict(cell.x_t, cell.t, cell.condition)
    each = (time.perf_counter() - start) / len(cell.t)
    start = time.perf_counter()
    session.apply(0.5, denoiser)
    merge = time.perf_counter() - start
    return each * draws.count_passes(P) + merge * draws.count_merges(P)


def merge_groups(
    granularity: Literal["model", "block", "layer"], denoiser: nn.Module
) -> Literal["blocks"] | list[str] | None:
    """Return what has weights of its own, as `MergeSession` takes it."""
    if granularity == "model":
        return None
    return "blocks" if granularity == "block" else layer_patterns(denoiser)


def layer_patterns(denoiser: nn.Module) -> list[str]:
    """Return patterns of the modules with own tensors; those that hold others come last."""
    names = [name for name, tensor in denoiser.state_dict().items() if tensor.is_floating_point()]
    layers = list(dict.fromkeys(map(layer_of, names)))
    holding: set[str] = set()
    for layer in layers:
        holding |= {layer.rsplit(".", i)[0] for i in range(1, layer.count(".") + 1)}
    nested = [layer for layer in layers if layer in holding]
    nested.sort(key=lambda layer: -layer.count("."))
    ordered = [layer for layer in layers if layer not in holding] + nested
    return [f"{layer}.*" if layer in KINDS else layer for layer in ordered]


def _format(change: Change) -> str:
    return f"{change!s:18s} {'' if change.is_resolved else 'covers 0':9s}"
