"""An expert: a pipeline folder that was finetuned on a range of timesteps, with its expert.json.

A base that was trained from a random start is not an expert. Its record is base.json, of the same
form.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from demerge.errors import InputError
from demerge.storage.atomic import commit_json
from demerge.storage.layout import CheckpointLocation, inside, locate
from demerge.storage.safetensors_header import read_header
from demerge.storage.schema import Count, Record, Settings, Span, Table, read_record
from demerge.timesteps import STEPS, Partition, TimestepRange

EXPERT = "expert.json"
BASE = "base.json"
SPEC_RANGE = "modelspec.timestep_range"  # metadata of kohya, musubi and demerge
SPEC_TEXT = re.compile(r"\s*(\d{1,6})\s*[,-]\s*(\d{1,6})\s*")
NOISE = re.compile(r"(high|low)[ _-]?noise", re.IGNORECASE)


class Expert(Record):
    """What expert.json says of an expert.

    Attributes:
        range: [start, stop) of the timesteps that it was trained on.
        base_sha256: `content_sha256` of the denoiser that it was trained from.
        train_layers: the layers that were trained, None for all.
        sigma_rel: the length of the power-function average that `demerge ema` made of it.
        inputs, options: what must be equal for the same expert.
    """

    format: Literal["demerge.expert/1"] = "demerge.expert/1"
    range: Span
    base_sha256: str | None = None
    steps: Count | None = None
    skipped_steps: Count = 0
    train_layers: tuple[str, ...] | None = None
    sigma_rel: float | None = None
    inputs: Table = Field(default_factory=dict)
    options: Settings = Field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Expert({self.span}, {self.steps} steps)"

    @property
    def span(self) -> TimestepRange:
        """The range as a value."""
        return TimestepRange(*self.range)

    @classmethod
    def load(cls, path: str | Path) -> Expert:
        """Read an expert folder or its record.

        Raises:
            InputError: if the record is missing or damaged.
        """
        path = Path(path)
        file = path / EXPERT if path.is_dir() else path
        return read_record(file, cls, fix="use the expert.json that `demerge finetune` wrote")

    def save(self, path: str | Path) -> Path:
        """Write the record to a file; equal experts give equal bytes."""
        return commit_json(Path(path), self.model_dump(mode="json"))


def find_expert(location: CheckpointLocation) -> Expert | None:
    """Return the expert whose weights lie at a location; None if there is no expert.json.

    Raises:
        InputError: if the record is damaged.
    """
    path = location.find_file(EXPERT)
    return None if path is None else Expert.load(path)


def find_expert_range(location: CheckpointLocation) -> TimestepRange | None:
    """Return the range of the expert at a location, by its expert.json or the file's metadata.

    Trainers write `--min_timestep` and `--max_timestep`, "875,1000"; ModelSpec's own example counts
    the last timestep in, "0,999".

    Raises:
        InputError: if the record or the header of the file is damaged.
    """
    expert = find_expert(location)
    if expert is not None:
        return expert.span
    metadata = read_header(location.files[0]).metadata if location.files else {}
    match = SPEC_TEXT.fullmatch(metadata.get(SPEC_RANGE, ""))
    if match is None:
        return None
    start, stop = int(match[1]), int(match[2])
    if stop == STEPS - 1:
        stop = STEPS
    return TimestepRange(start, stop) if start < stop else None


def find_noise_side(location: CheckpointLocation) -> Literal["high", "low"] | None:
    """Return which of Wan 2.2's two experts a file or its folder is named after, None for neither.

    Trainers name them NAME_high_noise and NAME_low_noise, the originals high_noise_model and
    low_noise_model.
    """
    folder = location.component or location.path.parent
    for name in (location.path.name, folder.name):
        sides = {side.lower() for side in NOISE.findall(name)}
        if len(sides) == 1:
            return "high" if "high" in sides else "low"
    return None


def find_plain_experts(folder: str | Path) -> list[Path]:
    """Return the files of a folder that are experts of other trainers, if there are two or more.

    They say by their metadata or by their names which timesteps they are for.
    """
    files, folder = [], Path(folder)
    if (folder / EXPERT).is_file():
        return []
    for file in sorted(folder.glob("*.safetensors")):
        location = locate(file)
        if find_noise_side(location) or find_expert_range(location):
            files.append(file)
    return files if len(files) > 1 else []


def list_experts(folder: str | Path, pair: Partition | None = None) -> dict[TimestepRange, Path]:
    """Return the experts in a folder by their ranges, in the order of t.

    They are the subfolders with an expert.json, or else the files of `find_plain_experts`.

    Args:
        pair: the ranges of the base's two denoisers, for files that say high_noise or low_noise.

    Raises:
        InputError: if there is none, two have the same range, the range of one is not known, or a
            record is damaged or a link out of the folder.
    """
    folder = Path(folder)
    experts: dict[TimestepRange, Path] = {}
    records = sorted(folder.glob(f"*/{EXPERT}"))
    paths = [path.parent for path in records] or find_plain_experts(folder)
    for path in paths:
        span = Expert.load(inside(folder, path / EXPERT)).span if records else _range(path, pair)
        if span in experts:
            both = f"{experts[span].name} and {path.name}"
            raise InputError(f"{folder}: {both} both have the range {span}", fix="keep one of them")
        experts[span] = path
    if not experts:
        what = f"{folder}: no expert.json in its subfolders"
        raise InputError(what, fix="name the folder that `demerge finetune -o` filled")
    return dict(sorted(experts.items()))


def _range(file: Path, pair: Partition | None) -> TimestepRange:
    """Return the range of a file by its metadata, or else by its name and the base's ranges."""
    location = locate(file)
    span = find_expert_range(location)
    if span is None and pair is not None:
        low, high = pair
        span = high if find_noise_side(location) == "high" else low
    if span is None:
        what = f"{file}: where its range ends is not known, as the base has one denoiser"
        fix = f"name a base of two denoisers, or write {SPEC_RANGE} into the file's metadata"
        raise InputError(what, fix=fix)
    return span
