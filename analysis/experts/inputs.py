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

FIX = "give --ranges, for example uniform:4"


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
        """What is supposed or passed over, as lines of a plan."""
        return [f"note    {note}" for note in note_ignored(self.base, self.models)]

    def find_ranges(self, text: str | None, T: int, *, experts: int | None = None) -> Partition:
        """Return the ranges that `text` asks for, or else the experts' own, of T timesteps.

        All tensors are checked to be finite before any record is read.

        Args:
            text: uniform:N, joint or a partition.json; None for the experts' own ranges.
            experts: how many of the models are experts; all by default.

        Raises:
            UsageError: if the text is none of these, or the experts' ranges are not a partition.
            InputError: if a model holds NaN or Inf.
        """
        partition = None if text is None else Partition.parse(text, T)
        self._check_finite()
        return partition or _own_ranges(self.spans[:experts], T)

    def _check_finite(self) -> None:
        paths = (self.base_path, *self.paths)
        for path, model in zip(paths, (self.base, *self.models), strict=True):
            for name in model:
                if not finite(model[name]):
                    file = model.specs[name].file if isinstance(model, Checkpoint) else path
                    what = f"{file}: tensor '{name}' holds NaN or Inf"
                    raise InputError(what, fix="use another checkpoint of this model")

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
        return {
            "data": images.name,
            "data_fingerprint": images.fingerprint,
            "split": split,
            "trained_on": trained_on,
            "ranges": [[span.start, span.stop] for span in ranges],
        }


def open_experts(base: str, paths: Sequence[str], *, skip_text: bool = False) -> OpenedExperts:
    """Open a base and models finetuned from it, and check that they fit each other.

    Args:
        skip_text: leave out what a LoRA does to text encoders. It is an error else.

    Raises:
        InputError: if a model cannot be read or does not fit the base.
    """
    origin = Checkpoint.open(base)
    models = tuple(open_expert(path, origin, skip_text=skip_text) for path in paths)
    check_same_base(origin, models)
    check_same_tensors(origin, models, [base, *paths])
    return OpenedExperts(base, origin, tuple(paths), models)


def _own_ranges(spans: Sequence[TimestepRange | None], T: int) -> Partition:
    known = sorted(span for span in spans if span)
    try:
        partition = Partition(tuple(dict.fromkeys(known)))
    except UsageError as error:
        what = f"the ranges of the experts are not a partition: {error.what}"
        raise UsageError(what, fix=FIX) from error
    if partition.total != T:
        what = f"the ranges of the experts, {partition}, do not cover [0, {T})"
        raise UsageError(what, fix=FIX)
    return partition


def _sha256(model: Expert) -> str:
    """Return the hash of a model's tensors, or of the deltas that a LoRA stands for."""
    return remembered_content(model) if isinstance(model, Checkpoint) else content_sha256(model)
