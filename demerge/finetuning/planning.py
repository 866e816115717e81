"""The plan of a finetune: base, data, ranges and cost, known before the first step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from demerge.device import resolve_device
from demerge.diffusion.encoded import Blank, EncodedData
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import fitting_threads
from demerge.durations import format_seconds
from demerge.errors import UsageError
from demerge.finetuning.buckets import Bucket, check_buckets, make_buckets
from demerge.finetuning.executors.choice import choose
from demerge.finetuning.executors.local import LocalExecutor
from demerge.finetuning.executors.options import ExecutorOptions
from demerge.finetuning.executors.tasks import Executor, Task
from demerge.finetuning.layers import load_layers
from demerge.finetuning.lora import count_trained, freeze_base, lora_targets
from demerge.finetuning.objective import check_density, loss_weights
from demerge.finetuning.optimizers import check_installed
from demerge.finetuning.options import FinetuneInputs, FinetuneOptions
from demerge.finetuning.train import (
    Stop,
    check_output,
    disk_of_run,
    make_observers,
    never,
    train_ranges,
)
from demerge.finetuning.trainer import ExpertTraining, Job, record_name
from demerge.parallel import join
from demerge.progress import Progress, silent
from demerge.stage import Cost
from demerge.storage.atomic import check_disk_space, place_for
from demerge.timesteps import Partition, TimestepRange

LONG_STEP = 5.0  # seconds


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
    """The experts of a finetune.

    Attributes:
        notes: lines of the executor, such as how to submit the jobs that it wrote.
    """

    plan: FinetunePlan
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the notes: the experts and their logs are on disk."""
        return list(self.notes)

    def document(self) -> dict[str, Any]:
        """Return the plan, which names the experts, as JSON values."""
        return self.plan.document()


@dataclass(frozen=True, slots=True)
class StepCost:
    """What one step takes on this machine: seconds, and bytes of the device's memory if known."""

    seconds: float
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class FinetunePlan:
    """All that a finetune reads, and its cost.

    Attributes:
        job: base, data, options and what the experts record.
        ranges: the ranges that are trained here.
        finished_steps: steps of the experts that are finished already.
        trained: the number of parameters that train.
        condition: what the denoiser takes besides x_t and t; None if nothing.
        ranked_for: the ranges that the job's layers were chosen for.
        step: what a step takes, measured; None if nothing is left to do here.
        executor: runs the tasks; None if this process trains the ranges one after the other.
        tasks: one for each unfinished range.
        buckets: of aspect ratios; one if all images have one size.
        encoded: latents and text of each bucket, if they are kept on disk.
        stop: as in `demerge.finetuning.finetune`.
    """

    job: Job
    ranges: tuple[TimestepRange, ...]
    out: Path
    finished_steps: int
    trained: int
    condition: str | None = None
    ranked_for: tuple[TimestepRange, ...] = ()
    step: StepCost | None = None
    stop: Stop = never
    executor: Executor | None = None
    tasks: tuple[Task, ...] = ()
    buckets: tuple[Bucket, ...] = ()
    encoded: tuple[EncodedData, ...] = ()

    @property
    def base(self) -> Diffusion:
        """The base that is finetuned."""
        return self.job.base

    @property
    def options(self) -> FinetuneOptions:
        """The options, with the number of steps that a range gets."""
        return self.job.options

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.job.world.is_main

    def cost(self) -> Cost:
        """Return the steps over all ranges, the seconds left, and the most bytes on disk."""
        o, step = self.options, self.step
        disk = disk_of_run(self.base, len(self.ranges), self.trained, o)
        disk += sum(data.missing() for data in self.encoded)
        steps = len(self.ranges) * o.max_train_steps
        seconds = None if step is None else step.seconds * (steps - self.finished_steps)
        memory = None if step is None else step.memory
        return Cost(steps=steps, seconds=seconds, memory=memory, disk=disk)

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "out": str(self.out),
            "experts": [str(self.out / str(span)) for span in self.ranges],
            "steps_per_expert": self.options.max_train_steps,
            "finished_steps": self.finished_steps,
            "images": len(self.job.data),
            "parameters": self.base.parameters,
            "trained_parameters": self.trained,
            "seconds_per_step": None if self.step is None else self.step.seconds,
            "memory_bytes": self.cost().memory,
            "disk_bytes": self.cost().disk,
            "cache_bytes": sum(data.bytes for data in self.encoded),
            "options": self.options.document(),
        }

    def describe(self) -> list[str]:
        """Return the plan for a person."""
        o, base, job, cost = self.options, self.base, self.job, self.cost()
        batch = o.samples_per_step(job.world.size)
        epochs = o.max_train_steps * batch / len(job.data)
        source = base.folder or "random start"
        lines = [f"base    {source}: {base.parameters:,} parameters, {base.prediction_type}"]
        if job.layers is not None:
            share = f"{self.trained / base.parameters:.1%} of the parameters train"
            lines.append(f"layers  {len(job.layers)}: {share}")
        if o.lora_rank is not None:
            count = len(lora_targets(base.denoiser, o))
            share = f"{self.trained:,} parameters, {self.trained / base.parameters:.2%} of the base"
            lines.append(f"lora    rank {o.lora_rank} on {count} layers: {share}")
        lines.append(f"data    {job.data.name}: {len(job.data):,} images {job.data.shape}")
        if self.condition:
            dropped = f"; {o.caption_dropout:.0%} of them left empty" if base.requires_text else ""
            lines.append(f"input   {self.condition}{dropped}")
        lines += [
            f"ranges  {' '.join(map(str, self.ranges))}",
            f"steps   {o.max_train_steps} each, batch {batch} ({epochs:.1f} epochs)",
        ]
        if job.world.size > 1:
            lines.append(
                f"shared  by {job.world.size} processes, {o.samples_per_step()} images each"
            )
        if self.executor is not None and self.tasks:
            lines.append(f"tasks   {self.executor.describe(len(self.tasks))}")
        if self.step is not None and cost.seconds is not None:
            seconds = self.step.seconds
            speed = f"{1e3 * seconds:.3g} ms a step, {batch / seconds:,.0f} images/s"
            lines.append(f"time    about {format_seconds(cost.seconds)}: {speed}")
        if cost.memory is not None:
            lines.append(f"memory  {cost.memory / 1e9:.1f} GB of the GPU")
        if len(self.buckets) > 1:
            lines.append(f"buckets {', '.join(map(str, self.buckets))}")
        if self.encoded:
            size = sum(data.bytes for data in self.encoded) / 1e6
            missing = sum(data.missing() for data in self.encoded) / 1e6
            kept = " and ".join(self.encoded[0].tables)
            lines.append(f"cache   {size:,.1f} MB of {kept}, {missing:,.1f} MB to be encoded")
        lines.append(f"disk    up to {(cost.disk or 0) / 1e6:.0f} MB")
        if self.ranked_for and self.ranked_for != self.ranges:
            spans = " ".join(map(str, self.ranked_for))
            lines.append(f"note    the layers were chosen for the ranges {spans}")
        if o.consistency > 0:
            reach = f"{1 / (1 + o.consistency):.0%} of the change that the data calls for"
            lines.append(f"note    consistency {o.consistency:g} leaves an expert {reach}")
        return lines

    def run(self, progress: Progress = silent) -> FinetuneResult:
        """Train the experts that are not finished; see `demerge.finetuning.finetune`."""
        if self.executor is not None:
            return self._run_tasks(self.executor, progress)
        total, finished = self.cost().steps, self.finished_steps
        batch = self.options.samples_per_step(self.job.world.size)
        start, first = 0.0, 0
        for step in train_ranges(self._encoded_job(progress), self.ranges, self.out, self.stop):
            now = time.perf_counter()
            if first == 0 or step.step <= first:  # the first step of an expert also warms up
                start, first = now, step.step
            speed = ""
            if step.step > first:
                speed = f", {(step.step - first) * batch / (now - start):,.0f} images/s"
            progress(finished + step.step, total, f"{step.range} loss {step.loss:.4f}{speed}")
            if step.step == step.total:
                finished += step.total
        return FinetuneResult(replace(self, finished_steps=finished))

    def _encoded_job(self, progress: Progress) -> Job:
        """Return the job, after latents and text are encoded if they are kept."""
        if not self.encoded or self.finished_steps == self.cost().steps:
            return self.job
        for data in self.encoded if self.is_main else ():
            data.fill(progress)
        self.job.world.wait()
        for data in self.encoded:
            data.open()
        if not self.options.preview_steps and not self.options.fisher_samples:
            self.encoded[0].release()
        return replace(self.job, encoders=self.encoded)

    def _run_tasks(self, executor: Executor, progress: Progress) -> FinetuneResult:
        """Let the executor train the experts that are not finished."""
        all_steps, finished = self.cost().steps, self.finished_steps
        notes: list[str] = []
        if self.tasks:

            def add_finished(done: int, total: int, text: str = "") -> None:
                progress(finished + done, all_steps, text)

            notes = executor.run(self.tasks, add_finished, self.stop)
        finished += sum(task.steps for task in self.tasks if task.is_finished())
        return FinetuneResult(replace(self, finished_steps=finished), tuple(notes))


def measure_step(job: Job, span: TimestepRange) -> StepCost:
    """Take one or two steps of a training that is thrown away, and time the last."""
    is_cuda, taken = job.base.device.type == "cuda", list[float]()
    with TemporaryDirectory() as empty, fitting_threads(job.base, job.options.train_batch_size):
        training = ExpertTraining(job, span, Path(empty))
        while not taken or (len(taken) == 1 and taken[0] < LONG_STEP):  # the first also warms up
            start = time.perf_counter()
            training.take_step()
            training.read_losses()
            taken.append(time.perf_counter() - start)
        training.batches.close()
    return StepCost(taken[-1], torch.cuda.max_memory_allocated() if is_cuda else None)


def plan(
    inputs: FinetuneInputs,
    options: FinetuneOptions,
    execution: ExecutorOptions | None = None,
    *,
    tell: Callable[[str], None] | None = None,
) -> FinetunePlan:
    """Load what a finetune needs and complete its options.

    With `init="random"` the model is a config, the objective has no teacher and no projection, and
    the range is [0, T) unless one is given.

    Args:
        tell: called with a line if the run goes on in another way than it was asked to.

    Raises:
        UsageError, InputError: if model, data, ranges or layers are wrong, or the output folder
            holds other work.
    """
    out = place_for(inputs.out)
    random = inputs.init == "random"
    executor = choose(execution or ExecutorOptions(), inputs.device)
    device = "cpu" if executor else resolve_device(inputs.device)  # else the tasks need the GPUs
    world, device = join(device, inputs.num_processes)
    wanted = options
    check_installed(options)
    observers = make_observers(options, out)
    if random and inputs.train_layers is not None:
        fix = "leave out --train-layers, or give a pretrained base"
        raise UsageError("a random start trains all layers", fix=fix)
    if random:
        base = Diffusion.random(inputs.model, seed=options.seed).to(device)
        options = replace(options, consistency=0.0, projection="none")
    else:
        base = Diffusion.load(
            inputs.model, device=device, resolution=inputs.resolution, pairs=False
        )
    partition, factor = parse_ranges(inputs.ranges or ("joint" if random else "uniform:4"), base.T)
    options = replace(options, max_train_steps=options.max_train_steps * factor)
    loss_weights(base, options)
    check_density(base, options, partition)
    _, height, width = base.image_shape
    if height != width:
        fix = "use a base of square images"
        raise UsageError(f"the base makes {width} x {height} images", fix=fix)
    data = base.load_images(inputs.data, split=inputs.split, skip_broken=inputs.skip_broken)
    condition = base.describe_condition(data)
    path = inputs.train_layers
    layers, ranked_for = (None, ()) if path is None else load_layers(path, base)
    ranges = _choose(partition.ranges, inputs.only)
    recorded = check_output(base, data, ranges, options, out, layers=layers)
    records = [out / str(span) / record_name(base) for span in ranges]
    unfinished = [s for s, record in zip(ranges, records, strict=True) if not record.is_file()]
    trained = count_trained(base.denoiser, options, layers)
    base = freeze_base(base, options)
    if isinstance(executor, LocalExecutor) and len(unfinished) < 2:
        executor, base = None, base.to(resolve_device(inputs.device))
    steps = options.max_train_steps
    tasks = tuple(Task(span, inputs, wanted, steps) for span in unfinished)
    buckets = make_buckets(base, data, options)
    encoded = _encoded(inputs, options, buckets, recorded["base"]["components"])
    is_here = bool(unfinished) and executor is None
    if is_here:
        check_buckets(buckets)
    blanks = tuple(Blank(data.base) for data in encoded)
    job = Job(base, data, options, recorded, layers, world, tell, observers)
    return FinetunePlan(
        job,
        ranges,
        out,
        (len(ranges) - len(unfinished)) * steps,
        trained,
        condition,
        ranked_for,
        measure_step(replace(job, encoders=blanks), unfinished[0]) if is_here else None,
        executor=executor,
        tasks=() if executor is None else tasks,
        buckets=buckets,
        encoded=encoded,
    )


def _encoded(
    inputs: FinetuneInputs,
    options: FinetuneOptions,
    buckets: Sequence[Bucket],
    components: Mapping[str, str],
) -> tuple[EncodedData, ...]:
    """Return latents and text of each bucket, if they are to be kept.

    Raises:
        UsageError: if the base encodes nothing.
        ResourceError: if the disk is too small.
    """
    if inputs.cache_latents is None:
        return ()
    folder = place_for(inputs.cache_latents)
    batch, mirrors = options.train_batch_size, options.random_flip
    encoded = tuple(
        EncodedData(b.base, b.data, folder, components, batch=batch, mirrors=mirrors)
        for b in buckets
    )
    check_disk_space(folder, sum(data.missing() for data in encoded))
    return encoded


def _choose(ranges: tuple[TimestepRange, ...], only: Sequence[str]) -> tuple[TimestepRange, ...]:
    """Return the ranges of `only`, or all if it is empty.

    Raises:
        UsageError: if one is not a range, or not among the ranges.
    """
    chosen = [TimestepRange.parse(text) for text in only]
    for span in chosen:
        if span not in ranges:
            fix = f"give some of {' '.join(map(str, ranges))}"
            raise UsageError(f"--only {span} is not one of the ranges", fix=fix)
    return tuple(span for span in ranges if span in chosen) if chosen else ranges
