"""An expert on disk: a pipeline folder with expert.json, which says what it was trained on and how.

A base that was trained from a random start is not an expert: its record is base.json, of the same form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from demerge.errors import InputError
from demerge.storage.layout import CheckpointLocation, inside
from demerge.storage.schema import Count, Record, Span, Table, read_record
from demerge.timesteps import TimestepRange

EXPERT = "expert.json"
BASE = "base.json"
FORMAT: Literal["demerge.expert/1"] = "demerge.expert/1"


class ExpertRecord(Record):
    """What `demerge finetune` leaves beside the weights.

    Attributes:
        range: [start, stop) of the timesteps that it was trained on.
        base_sha256: `content_sha256` of the denoiser that it was trained from.
        train_layers: the layers that were trained, None for all.
        inputs, options: what must be equal for the same expert.
    """

    format: Literal["demerge.expert/1"] = FORMAT
    range: Span
    base_sha256: str | None = None
    steps: Count | None = None
    skipped_steps: Count = 0
    train_layers: tuple[str, ...] | None = None
    inputs: Table = Field(default_factory=dict)
    options: Table = Field(default_factory=dict)

    @property
    def span(self) -> TimestepRange:
        """The range as a value."""
        return TimestepRange(*self.range)


def read_expert(path: Path) -> ExpertRecord:
    """Read an expert.json.

    Raises:
        InputError: where it is damaged.
    """
    return read_record(path, ExpertRecord, fix="use the expert.json that `demerge finetune` wrote")


def expert_of(place: CheckpointLocation) -> ExpertRecord | None:
    """Return the record of the expert at a place, None where it has none.

    Raises:
        InputError: where it is damaged.
    """
    path = place.beside(EXPERT)
    return None if path is None else read_expert(path)


def expert_range(place: CheckpointLocation) -> TimestepRange | None:
    """Return the range that an expert's record names, None where it has no record.

    Raises:
        InputError: where the record is damaged.
    """
    record = expert_of(place)
    return None if record is None else record.span


def experts_in(folder: Path) -> dict[TimestepRange, Path]:
    """Return the folders of the experts below a folder by their ranges, in the order of t.

    Raises:
        InputError: where there is none, two have one range, or a record is damaged or linked out of the folder.
    """
    found: dict[TimestepRange, Path] = {}
    for path in sorted(folder.glob(f"*/{EXPERT}")):
        span = read_expert(inside(folder, path)).span
        if span in found:
            raise InputError(
                f"{folder}: {found[span].name} and {path.parent.name} are both of {span}",
                fix="keep one of them",
            )
        found[span] = path.parent
    if not found:
        raise InputError(
            f"{folder}: no expert.json in its subfolders",
            fix="name the folder that `finetune -o` filled",
        )
    return dict(sorted(found.items()))
