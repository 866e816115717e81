"""A base and its experts, opened and checked for coefficients, landscape and transfer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from demerge.data import ImageData
from demerge.errors import InputError, UsageError
from demerge.expert import find_expert, find_expert_range
from demerge.lora import open_expert
from demerge.merging.engine.validation import check_same_tensors
from demerge.merging.inputs.components import note_ignored
from demerge.merging.inputs.experts import ExpertWeights as Expert
from demerge.merging.inputs.experts import check_same_base
from demerge.storage.checkpoint import Checkpoint, content_sha256, finite
from demerge.storage.hashing import remembered_content
from demerge.timesteps import Partition, TimestepRange


@dataclass(frozen=True, slots=True, eq=False)
class OpenedExperts:
    """A base and models that were finetuned from it, in the order of their paths."""

    base_path: str
    base: Checkpoint
    paths: tuple[str, ...]
    models: tuple[Expert, ...]

    @property
    def spans(self) -> list[TimestepRange | None]:
        """The range that each model was trained on, if its expert.json says it."""
        return [find_expert_range(model.place) for model in self.models]

    @property
    def notes(self) -> list[str]:
        """What is assumed or ignored, as lines of a plan."""
        return [f"note    {note}" for note in note_ignored(self.base, self.models)]

    def find_ranges(self, text: str | None, T: int, *, experts: int | None = None) -> Partition:
        """Return the ranges of a text, or else those of the first `experts` models, of T timesteps.

        All tensors are checked to be finite before any record is read.
        """
        partition = None if text is None else Partition.parse(text, T)
        paths, models = (self.base_path, *self.paths), (self.base, *self.models)
        for path, model in zip(paths, models, strict=True):
            for name in model:
                if not finite(model[name]):
                    file = model.specs[name].file if isinstance(model, Checkpoint) else path
                    what = f"{file}: tensor '{name}' holds NaN or Inf"
                    raise InputError(what, fix="use another checkpoint of this model")
        return partition or _own_ranges(self.spans[:experts], T)

    def describe_base(self) -> dict[str, str]:
        """Return path and hash of the base, for a record."""
        return {"path": self.base_path, "sha256": _sha256(self.base)}

    def describe_models(self) -> list[dict[str, str]]:
        """Return path and hash of each model, for a record."""
        pairs = zip(self.paths, self.models, strict=True)
        return [{"path": path, "sha256": _sha256(model)} for path, model in pairs]

    def describe_data(self, images: ImageData, split: str, ranges: Partition) -> dict[str, Any]:
        """Return data and ranges, and which models were trained on these images, for a record."""
        trained_on = []
        for path, model in zip(self.paths, self.models, strict=True):
            expert = find_expert(model.place)
            if expert and expert.inputs.get("data_fingerprint") == images.fingerprint:
                trained_on.append(path)
        data = {"data": images.name, "data_fingerprint": images.fingerprint, "split": split}
        spans = [[span.start, span.stop] for span in ranges]
        return {**data, "trained_on": trained_on, "ranges": spans}


def open_experts(base: str, paths: Sequence[str], *, skip_text: bool = False) -> OpenedExperts:
    """Open a base and models finetuned from it, and check that they fit each other."""
    origin = Checkpoint.open(base)
    models = tuple(open_expert(path, origin, skip_text=skip_text) for path in paths)
    check_same_base(origin, models)
    check_same_tensors(origin, models, [base, *paths])
    return OpenedExperts(base, origin, tuple(paths), models)


def _own_ranges(spans: Sequence[TimestepRange | None], T: int) -> Partition:
    known = sorted(span for span in spans if span)
    fix = "give --ranges, for example uniform:4"
    try:
        partition = Partition(tuple(dict.fromkeys(known)))
    except UsageError as error:
        what = f"the ranges of the experts are not a partition: {error.what}"
        raise UsageError(what, fix=fix) from error
    if partition.total != T:
        what = f"the ranges of the experts, {partition}, do not cover [0, {T})"
        raise UsageError(what, fix=fix)
    return partition


def _sha256(model: Expert) -> str:
    """Return the hash of a model's tensors, or of the deltas that a LoRA stands for."""
    return remembered_content(model) if isinstance(model, Checkpoint) else content_sha256(model)
