"""What experts carry with them: the ranges and the data of their records, the hash of what they change, and finite numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from demerge.data import ImageData
from demerge.errors import InputError, UsageError
from demerge.expert import find_expert, find_expert_range
from demerge.merging.inputs.experts import Expert
from demerge.storage.checkpoint import Checkpoint, content_sha256, finite
from demerge.storage.hashing import remembered_content
from demerge.storage.layout import CheckpointLocation
from demerge.timesteps import Partition


def own_ranges(places: Sequence[CheckpointLocation], T: int) -> Partition:
    """Return the partition of [0, T) that the experts' ranges make.

    Raises:
        UsageError: where they make none.
    """
    spans = sorted(span for place in places if (span := find_expert_range(place)))
    try:
        partition = Partition(tuple(dict.fromkeys(spans)))
    except UsageError as error:
        raise UsageError(
            f"the experts' ranges make no partition: {error.what}",
            fix="give --ranges, e.g. uniform:4",
        ) from error
    if partition.total != T:
        raise UsageError(
            f"the experts' ranges {partition} do not cover [0, {T})",
            fix="give --ranges, for example uniform:4",
        )
    return partition


def settled_ranges(
    text: str | None,
    T: int,
    paths: Sequence[str],
    models: Sequence[Expert],
    experts: Sequence[Expert],
) -> Partition:
    """Return the ranges that are asked for, or else the experts' own, of T timesteps.

    Args:
        text: uniform:N, joint or a partition.json.
        paths, models: of base, experts and what else is compared; their numbers are looked at before anyone's record.

    Raises:
        UsageError: where the text is none of these, or the experts' ranges do not make a partition.
        InputError: where a model holds a number that is not finite.
    """
    given = None if text is None else Partition.parse(text, T)
    check_finite(paths, models)
    return given or own_ranges([expert.place for expert in experts], T)


def check_finite(paths: Sequence[str], models: Sequence[Expert]) -> None:
    """Refuse models that hold a number that is not finite, before anything is made of their records.

    Raises:
        InputError: naming file and tensor.
    """
    for path, model in zip(paths, models, strict=True):
        for name in model:
            if not finite(model[name]):
                file = model.specs[name].file if isinstance(model, Checkpoint) else path
                raise InputError(
                    f"{file}: tensor '{name}' holds NaN or Inf",
                    fix="use another checkpoint of this model",
                )


def sha256_of(model: Expert) -> str:
    """Return the hash of a model's tensors, or of the deltas that a LoRA stands for."""
    return remembered_content(model) if isinstance(model, Checkpoint) else content_sha256(model)


def measured_on(
    images: ImageData,
    split: str,
    ranges: Partition,
    paths: Sequence[str],
    experts: Sequence[Expert],
) -> dict[str, Any]:
    """Return the data and ranges that experts are measured on, and which of them were trained on these very images."""
    known = [
        path
        for path, e in zip(paths, experts, strict=True)
        if _data_of(e.place) == images.fingerprint
    ]
    return {
        "data": images.name,
        "data_fingerprint": images.fingerprint,
        "split": split,
        "trained_on": known,
        "ranges": [[span.start, span.stop] for span in ranges],
    }


def _data_of(place: CheckpointLocation) -> Any:
    """Return the fingerprint of the data that an expert's record says it was trained on."""
    record = find_expert(place)
    return None if record is None else record.inputs.get("data_fingerprint")
