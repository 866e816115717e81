"""The loop over ranges: a base and data in, one expert folder per range out.

    OUT/0000-0250/          a stock diffusers pipeline, expert.json (base.json of a base), log.jsonl
    OUT/state/0000-0250/    checkpoints and log of an unfinished expert

The same call again continues each unfinished expert from its newest checkpoint and leaves finished
ones alone. Joint finetuning is the same loop on the range [0, T). A base is trained by it from
random weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import fitting_threads
from demerge.errors import UsageError
from demerge.expert import Expert
from demerge.finetuning.checkpoint import disk_bytes, newest_state
from demerge.finetuning.layers import check_layers_exist, hash_layers, trained_parameters
from demerge.finetuning.options import FinetuneOptions
from demerge.finetuning.trainer import ExpertTraining, TrainingStep, record_name
from demerge.parallel import ALONE, World
from demerge.provenance import check_same_settings
from demerge.storage.atomic import check_disk_space, check_is_new, place_for
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
    stop: Stop = never,
) -> Iterator[TrainingStep]:
    """Train an expert of `base` on each range and write it to OUT/RANGE; yield after each step.

    Args:
        layers: the layers that train; all others stay the base's. None trains all.
        stop: called after each step; if true, the state is saved and `Preempted` raised.

    Raises:
        UsageError: if OUT holds work of other options, inputs, layers or ranges.
        InputError: if the base has no layer of a name.
        NumericalError: if five steps in a row have no finite loss and gradient.
        Preempted: if `stop` returned true; the same call continues.
    """
    out = place_for(out)
    inputs = check_output(base, data, ranges, options, out, layers=layers)
    yield from train_ranges(base, data, ranges, options, out, inputs, layers=layers, stop=stop)


def train_ranges(
    base: Diffusion,
    data: ImageData,
    ranges: Sequence[TimestepRange],
    options: FinetuneOptions,
    out: Path,
    inputs: dict[str, Any],
    *,
    layers: Sequence[str] | None,
    stop: Stop,
    world: World = ALONE,
    tell: Callable[[str], None] | None = None,
) -> Iterator[TrainingStep]:
    """Train as `finetune` does, after `check_output`, which returned `inputs`.

    Args:
        world: the processes that share each step; the first one writes.
        tell: called with a line if a run goes on in another way than it was asked to.
    """
    for span in ranges:
        if (out / str(span) / record_name(base)).is_file():
            continue
        state = out / "state" / str(span)
        training = ExpertTraining(
            base, data, span, options, state, inputs, layers, world=world, tell=tell
        )
        with fitting_threads(base, options.train_batch_size):
            yield from training.train(stop)
            training.finish(out / str(span))
    with contextlib.suppress(OSError):
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
    check_layers_exist(base.denoiser, layers or (), "layers")
    trained = trained_parameters(base.denoiser, layers)
    disk = disk_bytes(base.parameters, len(ranges), trained, options.checkpoints_total_limit)
    check_disk_space(out, disk)
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
            record = Expert.load(finished / name).model_dump()
            check_same_settings(finished, record, options.binding(), inputs)
        elif snapshot := newest_state(state):
            binding = options.binding(snapshot.record.step)
            check_same_settings(state, snapshot.record.model_dump(), binding, inputs)
    return inputs


def _check_no_overlap(out: Path, ranges: Sequence[TimestepRange]) -> None:
    """Check that OUT has no work on ranges that overlap these: its experts are routed together."""
    for folder in [*out.glob("*-*"), *(out / "state").glob("*-*")]:
        try:
            other = TimestepRange.parse(folder.name)
        except UsageError:
            continue
        for span in ranges:
            if other != span and other.start < span.stop and span.start < other.stop:
                fix = "give another output folder"
                raise UsageError(f"{folder} overlaps the range {span}", fix=fix)
