"""What a finetune is about to do: base, data, ranges, and what it takes, known before the first step."""

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
from demerge.finetuning.trainer import record_name
from demerge.storage.atomic import place_for
from demerge.timesteps import Partition, TimestepRange


def parse_ranges(text: str, T: int) -> tuple[Partition, int]:
    """Read `uniform:4`, `joint`, `joint:4` or a partition.json; return the partition and how often the steps count.

    `joint` is the control on [0, T); `joint:K` trains it K times the steps, as many as K experts get together.

    Raises:
        UsageError: where the text is none of these, or the partition covers another number of timesteps than T.
    """
    kind, _, count = text.partition(":")
    if kind == "joint" and count.isdigit():
        return Partition.parse(kind, T), max(1, int(count))
    return Partition.parse(text, T, besides="joint:K"), 1


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `finetune` takes, and what it will cost."""

    base: Diffusion
    data: ImageData
    ranges: tuple[TimestepRange, ...]
    options: FinetuneOptions
    out: Path
    layers: tuple[str, ...] | None = None
    ranked_for: tuple[TimestepRange, ...] = ()

    @property
    def total_steps(self) -> int:
        """Steps over all ranges."""
        return len(self.ranges) * self.options.max_train_steps

    @property
    def finished_steps(self) -> int:
        """Steps of the experts that are there already."""
        return (
            sum((self.out / str(r) / record_name(self.base)).is_file() for r in self.ranges)
            * self.options.max_train_steps
        )

    @property
    def trained(self) -> int:
        """How many parameters are trained."""
        return trained_parameters(self.base.denoiser, self.layers)

    @property
    def disk_bytes(self) -> int:
        """The most that the run will hold on disk."""
        return disk_bytes(self.base.parameters, len(self.ranges), self.trained)

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "out": str(self.out),
            "experts": [str(self.out / str(r)) for r in self.ranges],
            "steps_per_expert": self.options.max_train_steps,
            "finished_steps": self.finished_steps,
            "images": len(self.data),
            "parameters": self.base.parameters,
            "trained_parameters": self.trained,
            "disk_bytes": self.disk_bytes,
            "options": self.options.document(),
        }

    def lines(self) -> list[str]:
        """Return the plan for a person."""
        o = self.options
        batch = o.train_batch_size * o.gradient_accumulation_steps
        lines = [
            f"base    {self.base.folder or 'random start'}: {self.base.parameters:,} parameters, {self.base.prediction_type}",
            f"data    {self.data.name}: {len(self.data):,} images {self.data.shape}",
            f"ranges  {' '.join(map(str, self.ranges))}",
            f"steps   {o.max_train_steps} each, batch {batch} ({o.max_train_steps * batch / len(self.data):.1f} epochs)",
            f"disk    up to {self.disk_bytes / 1e6:.0f} MB",
        ]
        if told := self.base.describe_condition(self.data):
            dropped = (
                f"; {o.caption_dropout:.0%} of them left empty" if self.base.requires_text else ""
            )
            lines.insert(2, f"given   {told}{dropped}")
        if self.layers is not None:
            lines.insert(
                1,
                f"layers  {len(self.layers)}: {self.trained / self.base.parameters:.1%} of the parameters train",
            )
        if self.ranked_for and self.ranked_for != self.ranges:
            lines.append(
                f"note    the layers were chosen for the ranges {' '.join(map(str, self.ranked_for))}"
            )
        if o.consistency > 0:
            share = 1 / (1 + o.consistency)
            lines.append(
                f"note    consistency {o.consistency:g} lets an expert reach {share:.0%} of its correction"
            )
        return lines


def plan(inputs: FinetuneInputs, options: FinetuneOptions) -> Plan:
    """Load what a finetune needs and settle its options.

    With `init="random"` the model is a config, the objective has no teacher and no projection, and
    the range is [0, T) unless one is given.

    Raises:
        UsageError, InputError: if model, data, ranges or layers are wrong.
    """
    out = place_for(inputs.out)
    random, device = inputs.init == "random", resolve_device(inputs.device)
    if random and inputs.train_layers is not None:
        fix = "leave out --train-layers, or give a pretrained base"
        raise UsageError("a random start trains all layers", fix=fix)
    if random:
        base = Diffusion.random(Path(inputs.model), seed=options.seed).to(device)
        options = replace(options, consistency=0.0, projection="none")
    else:
        base = Diffusion.load(inputs.model, device=device)
    ranges = inputs.ranges or ("joint" if random else "uniform:4")
    partition, factor = parse_ranges(ranges, base.T)
    options = replace(options, max_train_steps=options.max_train_steps * factor)
    loss_weights(base, options)
    _, height, width = base.image_shape
    if height != width:
        fix = "use a base of square images"
        raise UsageError(f"the base makes {width} x {height} images", fix=fix)
    images = base.load_images(inputs.data, split=inputs.split, skip_broken=inputs.skip_broken)
    base.describe_condition(images)
    path = inputs.train_layers
    layers, ranked_for = (None, ()) if path is None else load_layers(path, base)
    return Plan(base, images, partition.ranges, options, out, layers, ranked_for)
