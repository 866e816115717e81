"""What experts carry with them: the ranges of their records, and the hash of what they change."""

from __future__ import annotations

from collections.abc import Sequence

from demerge.errors import UsageError
from demerge.hashes import remembered_content
from demerge.merge.sources import Expert, expert_range
from demerge.places import Place
from demerge.timesteps import Partition
from demerge.weights import Checkpoint, content_sha256


def own_ranges(places: Sequence[Place], T: int) -> Partition:
    """Return the partition of [0, T) that the experts' ranges make.

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


def sha256_of(model: Expert) -> str:
    """Return the hash of a model's tensors, or of the deltas that a LoRA stands for."""
    return remembered_content(model) if isinstance(model, Checkpoint) else content_sha256(model)
