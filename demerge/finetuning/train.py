"""The loop over ranges: a base and data in, one expert folder per range out.

    OUT/0000-0250/            a stock diffusers pipeline, expert.json (base.json of a base), log.jsonl: whole or absent
    OUT/state/0000-0250/      checkpoints and log of an unfinished expert

The same call again resumes each unfinished expert from its newest whole checkpoint and leaves finished ones alone. Joint
finetuning is the same loop on the range [0, T); a base is trained by it from random weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.diffusion.threads import fitting_threads
from demerge.errors import UsageError
from demerge.expert import Expert
from demerge.finetuning.checkpoint import disk_bytes, newest_state
from demerge.finetuning.layers import check_layers_exist, digest, trained_parameters
from demerge.finetuning.options import FinetuneOptions
from demerge.finetuning.trainer import Progress, Run, record_name
from demerge.provenance import check_same_settings
from demerge.storage.atomic import check_disk_space, check_is_new, place_for
from demerge.timesteps import TimestepRange


def finetune(
    base: Diffusion,
    data: ImageData,
    ranges: Sequence[TimestepRange],
    options: FinetuneOptions,
    out: Path | str,
    *,
    layers: Sequence[str] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Progress]:
    """Train an expert of `base` on each range and write it to OUT/RANGE; yield after each step.

    Args:
        layers: the modules whose own parameters are trained; all others stay the base's. None trains all.
        stop: asked after each step; once true, the step's state is committed and `Preempted` raised.

    Raises:
        UsageError: where OUT holds work of other options, inputs, layers or ranges.
        InputError: where the base has no layer of a name.
        NumericalError: where five steps in a row have no finite loss and gradient.
        Preempted: where `stop` said so; the same call continues.
    """
    out = place_for(out)
    out = place_for(out)
    inputs = check(base, data, ranges, options, out, layers=layers)
    for span in ranges:
        if (out / str(span) / record_name(base)).is_file():
            continue
        run = Run.begin(base, data, span, options, out / "state" / str(span), inputs, layers)
        with fitting_threads(base, options.train_batch_size):
            yield from run.train(stop)
            run.finish(out / str(span))
    with contextlib.suppress(OSError):
        (out / "state").rmdir()  # kept while another range is unfinished


def check(
    base: Diffusion,
    data: ImageData,
    ranges: Sequence[TimestepRange],
    options: FinetuneOptions,
    out: Path,
    *,
    layers: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Compare what is asked with what OUT holds, before any work; return what the experts' records say of the inputs.

    Raises:
        UsageError, InputError: as `finetune` does.
        ResourceError: if the disk is too small.
    """
    for span in ranges:
        if span.stop > base.T:
            raise UsageError(
                f"range {span} reaches beyond the base's {base.T} timesteps",
                fix=f"stay in [0, {base.T})",
            )
        if not (out / str(span) / record_name(base)).is_file():
            check_is_new(out / str(span))
    _check_no_overlap(out, ranges)
    check_layers_exist(base.denoiser, layers or (), "layers")
    check_disk_space(
        out, disk_bytes(base.parameters, len(ranges), trained_parameters(base.denoiser, layers))
    )
    identity = base.identity
    inputs = {
        "base_sha256": identity.pop("sha256"),
        "base": identity,
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "layers_sha256": digest(layers),
    }
    for span in ranges:
        done, state = out / str(span), out / "state" / str(span)
        if (done / record_name(base)).is_file():
            check_same_settings(
                done, Expert.load(done / record_name(base)).model_dump(), options.binding(), inputs
            )
        elif snapshot := newest_state(state):
            check_same_settings(
                state, snapshot.record.model_dump(), options.binding(snapshot.record.step), inputs
            )
    return inputs


def _check_no_overlap(out: Path, ranges: Sequence[TimestepRange]) -> None:
    """Refuse a folder with work on ranges that overlap these: experts of one folder are routed together."""
    for folder in [*out.glob("*-*"), *(out / "state").glob("*-*")]:
        try:
            other = TimestepRange.parse(folder.name)
        except UsageError:
            continue
        for span in ranges:
            if other != span and other.start < span.stop and span.start < other.stop:
                raise UsageError(
                    f"{folder} overlaps the range {span}", fix="give another output folder"
                )
