"""The plan of a finetune: base, data, ranges and cost, known before the first step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demerge.data import ImageData
from demerge.device import resolve_device
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.finetuning.checkpoint import disk_bytes
from demerge.finetuning.layers import load_layers, trained_parameters
from demerge.finetuning.objective import loss_weights
from demerge.finetuning.options import FinetuneInputs, FinetuneOptions
from demerge.finetuning.train import Stop, check_output, never, train_ranges
from demerge.finetuning.trainer import record_name
from demerge.progress import Progress, silent
from demerge.stage import Cost
from demerge.storage.atomic import place_for
from demerge.timesteps import Partition, TimestepRange


def parse_ranges(text: str, T: int) -> tuple[Partition, int]:
    """Read `uniform:4`, `joint`, `joint:4` or a partition.json; return also a factor of steps.

    `joint` is the control on [0, T); `joint:K` trains it K times the steps, as many as K experts
    get together.

    Raises:
        UsageError: if the text is none of these, or the partition does not cover [0, T).
    """
    kind, _, count = text.partition(":")
    if kind == "joint" and count.isdigit():
        return Partition.parse(kind, T), max(1, int(count))
    return Partition.parse(text, T, also="joint:K"), 1


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """The experts of a finetune."""

    plan: FinetunePlan

    def lines(self) -> list[str]:
        """Return nothing: the experts and their logs are on disk."""
        return []

    def document(self) -> dict[str, Any]:
        """Return the plan, which names the experts, as JSON values."""
        return self.plan.document()


@dataclass(frozen=True, slots=True)
class FinetunePlan:
    """All that a finetune reads, and its cost.

    Attributes:
        inputs: what the experts record of base, data and layers.
        finished_steps: steps of the experts that are finished already.
        trained: the number of parameters that train.
        condition: what the denoiser takes besides x_t and t; None if nothing.
        layers: the layers that train; None is all.
        ranked_for: the ranges that these layers were chosen for.
        stop: as in `demerge.finetuning.finetune`.
    """

    base: Diffusion
    data: ImageData
    ranges: tuple[TimestepRange, ...]
    options: FinetuneOptions
    out: Path
    inputs: dict[str, Any]
    finished_steps: int
    trained: int
    condition: str | None = None
    layers: tuple[str, ...] | None = None
    ranked_for: tuple[TimestepRange, ...] = ()
    stop: Stop = never

    def cost(self) -> Cost:
        """Return the steps over all ranges, and the most bytes on disk during the run."""
        limit = self.options.checkpoints_total_limit
        disk = disk_bytes(self.base.parameters, len(self.ranges), self.trained, limit)
        return Cost(steps=len(self.ranges) * self.options.max_train_steps, disk=disk)

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "out": str(self.out),
            "experts": [str(self.out / str(span)) for span in self.ranges],
            "steps_per_expert": self.options.max_train_steps,
            "finished_steps": self.finished_steps,
            "images": len(self.data),
            "parameters": self.base.parameters,
            "trained_parameters": self.trained,
            "disk_bytes": self.cost().disk,
            "options": self.options.document(),
        }

    def describe(self) -> list[str]:
        """Return the plan for a person."""
        o, base = self.options, self.base
        batch = o.train_batch_size * o.gradient_accumulation_steps
        epochs = o.max_train_steps * batch / len(self.data)
        source = base.folder or "random start"
        lines = [f"base    {source}: {base.parameters:,} parameters, {base.prediction_type}"]
        if self.layers is not None:
            share = f"{self.trained / base.parameters:.1%} of the parameters train"
            lines.append(f"layers  {len(self.layers)}: {share}")
        lines.append(f"data    {self.data.name}: {len(self.data):,} images {self.data.shape}")
        if self.condition:
            dropped = f"; {o.caption_dropout:.0%} of them left empty" if base.requires_text else ""
            lines.append(f"given   {self.condition}{dropped}")
        lines += [
            f"ranges  {' '.join(map(str, self.ranges))}",
            f"steps   {o.max_train_steps} each, batch {batch} ({epochs:.1f} epochs)",
            f"disk    up to {(self.cost().disk or 0) / 1e6:.0f} MB",
        ]
        if self.ranked_for and self.ranked_for != self.ranges:
            spans = " ".join(map(str, self.ranked_for))
            lines.append(f"note    the layers were chosen for the ranges {spans}")
        if o.consistency > 0:
            reach = f"{1 / (1 + o.consistency):.0%} of its correction"
            lines.append(f"note    consistency {o.consistency:g} lets an expert reach {reach}")
        return lines

    def run(self, progress: Progress = silent) -> FinetuneResult:
        """Train the experts that are not finished; see `demerge.finetuning.finetune`."""
        total, finished = self.cost().steps, self.finished_steps
        for step in train_ranges(
            self.base,
            self.data,
            self.ranges,
            self.options,
            self.out,
            self.inputs,
            layers=self.layers,
            stop=self.stop,
        ):
            progress(finished + step.step, total, f"{step.range} loss {step.loss:.4f}")
            if step.step == step.total:
                finished += step.total
        return FinetuneResult(replace(self, finished_steps=finished))


def plan(inputs: FinetuneInputs, options: FinetuneOptions) -> FinetunePlan:
    """Load what a finetune needs and complete its options.

    With `init="random"` the model is a config, the objective has no teacher and no projection, and
    the range is [0, T) unless one is given.

    Raises:
        UsageError, InputError: if model, data, ranges or layers are wrong, or the output folder
            holds other work.
    """
    out = place_for(inputs.out)
    random, device = inputs.init == "random", resolve_device(inputs.device)
    if random and inputs.train_layers is not None:
        fix = "leave out --train-layers, or give a pretrained base"
        raise UsageError("a random start trains all layers", fix=fix)
    if random:
        base = Diffusion.random(inputs.model, seed=options.seed).to(device)
        options = replace(options, consistency=0.0, projection="none")
    else:
        base = Diffusion.load(inputs.model, device=device)
    partition, factor = parse_ranges(inputs.ranges or ("joint" if random else "uniform:4"), base.T)
    options = replace(options, max_train_steps=options.max_train_steps * factor)
    loss_weights(base, options)
    _, height, width = base.image_shape
    if height != width:
        fix = "use a base of square images"
        raise UsageError(f"the base makes {width} x {height} images", fix=fix)
    data = base.load_images(inputs.data, split=inputs.split, skip_broken=inputs.skip_broken)
    condition = base.describe_condition(data)
    path = inputs.train_layers
    layers, ranked_for = (None, ()) if path is None else load_layers(path, base)
    recorded = check_output(base, data, partition.ranges, options, out, layers=layers)
    names = [out / str(span) / record_name(base) for span in partition]
    finished = sum(name.is_file() for name in names) * options.max_train_steps
    trained = trained_parameters(base.denoiser, layers)
    return FinetunePlan(
        base,
        data,
        partition.ranges,
        options,
        out,
        recorded,
        finished,
        trained,
        condition,
        layers,
        ranked_for,
    )
