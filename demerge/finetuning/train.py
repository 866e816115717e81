"""The loop over ranges: a base and data in, one expert folder per range out.

    OUT/0000-0250/          a stock diffusers pipeline, expert.json (base.json of a base), log.jsonl
                            with --lora-rank: pytorch_lora_weights.safetensors, and no pipeline
    OUT/state/0000-0250/    checkpoints and log of an unfinished expert

The same call again continues each unfinished expert from its newest checkpoint and leaves finished
ones alone. Joint finetuning is the same loop on the range [0, T). A base is trained by it from
random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from demerge.data import ImageData
from demerge.diffusion.encoded import Encoder
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import fitting_threads
from demerge.errors import UsageError
from demerge.expert import Expert
from demerge.finetuning.checkpoint import disk_bytes, newest_state
from demerge.finetuning.layers import check_layers_exist, hash_layers
from demerge.finetuning.lora import check_lora, count_trained, freeze_base
from demerge.finetuning.losses import LossFiles
from demerge.finetuning.options import FinetuneOptions
from demerge.finetuning.power_averages import disk_bytes_of_averages
from demerge.finetuning.previews import Previews
from demerge.finetuning.projection import check_projection
from demerge.finetuning.trackers import Trackers, check_trackers
from demerge.finetuning.trainer import ExpertTraining, Job, Observer, TrainingStep, record_name
from demerge.provenance import check_same_settings
from demerge.storage.atomic import check_disk_space, check_is_new, place_for
from demerge.storage.lock import lock_folder
from demerge.timesteps import TimestepRange

Stop = Callable[[], bool]


def never() -> bool:
    """Do not stop."""
    return False


def finetune(
    base: Diffusion,
    data: ImageData,
    ranges: Sequence[TimestepRange],
    options: FinetuneOptions,
    out: str | Path,
    *,
    layers: Sequence[str] | None = None,
    encoders: Sequence[Encoder] = (),
    stop: Stop = never,
) -> Iterator[TrainingStep]:
    """Train an expert of `base` on each range and write it to OUT/RANGE; yield after each step.

    Args:
        layers: the layers that train; all others stay the base's. None trains all.
        encoders: give x_0 and text that were encoded before (`demerge.diffusion.encoded`), one for
            each bucket of aspect ratios.
        stop: called after each step; if true, the state is saved and `Preempted` raised.

    Raises:
        UsageError: if OUT holds work of other options, inputs, layers or ranges.
        InputError: if the base has no layer of a name.
        NumericalError: if five steps in a row have no finite loss and gradient.
        Preempted: if `stop` returned true; the same call continues.
    """
    out = place_for(out)
    inputs = check_output(base, data, ranges, options, out, layers=layers)
    observers = make_observers(options, out)
    frozen = freeze_base(base, options)
    job = Job(frozen, data, options, inputs, layers, observers=observers, encoders=encoders)
    yield from train_ranges(job, ranges, out, stop)


def make_observers(options: FinetuneOptions, out: Path) -> tuple[Observer, ...]:
    """Return what watches a training: files of losses, previews and trackers.

    Raises:
        UsageError: if the package of a tracker is not installed.
    """
    check_trackers(options)
    observers: list[Observer] = [LossFiles()]
    if options.preview_steps:
        observers.append(Previews())
    if options.report_to:
        observers.append(Trackers(tuple(options.report_to), out / "logs"))
    return tuple(observers)


def train_ranges(
    job: Job, ranges: Sequence[TimestepRange], out: Path, stop: Stop = never
) -> Iterator[TrainingStep]:
    """Train as `finetune` does, after `check_output`, which returned the job's inputs.

    Raises:
        UsageError: also if another process trains one of the ranges now.
    """
    base, world = job.base, job.world
    for span in ranges:
        record, state = out / str(span) / record_name(base), out / "state" / str(span)
        if record.is_file():
            continue
        with lock_folder(state) if world.is_main else nullcontext():
            if world.size == 1 and record.is_file():  # finished by another process meanwhile
                continue
            training = ExpertTraining(job, span, state)
            with fitting_threads(base, job.options.train_batch_size):
                yield from training.train(stop)
                training.finish(record.parent)
        world.wait()
    with suppress(OSError):
        (out / "state").rmdir()  # kept while another range is unfinished


def check_output(
    base: Diffusion,
    data: ImageData,
    ranges: Sequence[TimestepRange],
    options: FinetuneOptions,
    out: Path,
    *,
    layers: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Check that the work in OUT, if any, can be continued; return the inputs that experts record.

    Raises:
        UsageError, InputError: as `finetune` does.
        ResourceError: if the disk is too small.
    """
    name = record_name(base)
    for span in ranges:
        if span.stop > base.T:
            what = f"range {span} reaches beyond the base's {base.T} timesteps"
            raise UsageError(what, fix=f"stay in [0, {base.T})")
        if not (out / str(span) / name).is_file():
            check_is_new(out / str(span))
    _check_no_overlap(out, ranges)
    check_projection(base, options)
    check_layers_exist(base.denoiser, layers or (), "layers")
    check_lora(base, options, layers)
    trained = count_trained(base.denoiser, options, layers)
    check_disk_space(out, disk_of_run(base, len(ranges), trained, options))
    identity = base.identity
    inputs = {
        "base_sha256": identity.pop("sha256"),
        "base": identity,
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "layers_sha256": hash_layers(layers),
    }
    for span in ranges:
        finished, state = out / str(span), out / "state" / str(span)
        if (finished / name).is_file():
            record = _completed(Expert.load(finished / name).model_dump())
            check_same_settings(finished, record, options.binding(), inputs)
        elif snapshot := newest_state(state):
            binding = options.binding(snapshot.record.step)
            record = _completed(snapshot.record.model_dump())
            check_same_settings(state, record, binding, inputs)
    return inputs


def disk_of_run(base: Diffusion, experts: int, trained: int, options: FinetuneOptions) -> int:
    """Return the most bytes on disk during a run: experts, checkpoints and stored averages."""
    written = base.parameters if options.lora_rank is None else trained
    disk = disk_bytes(written, experts, trained, options.checkpoints_total_limit)
    return disk + disk_bytes_of_averages(options, experts, trained)


def _completed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the defaults of options that did not exist when it was written."""
    return {**record, "options": FinetuneOptions().document() | record["options"]}


def _check_no_overlap(out: Path, ranges: Sequence[TimestepRange]) -> None:
    """Check that OUT has no work on ranges that overlap these: its experts are routed together."""
    begun = [path.parent for path in (out / "state").glob("*-*/step-*")]
    for folder in [*out.glob("*-*"), *begun]:
        try:
            other = TimestepRange.parse(folder.name)
        except UsageError:
            continue
        for span in ranges:
            if other != span and other.start < span.stop and span.start < other.stop:
                fix = "give another output folder"
                raise UsageError(f"{folder} overlaps the range {span}", fix=fix)
