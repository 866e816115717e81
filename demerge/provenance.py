"""What the records of all stages share: versions, settings, and what a statistic is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from demerge.errors import UsageError
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.safetensors_header import read_header
from demerge.storage.schema import Record, Span, Table, Texts, parse_record, read_record, short
from demerge.timesteps import TimestepRange

STATS = "stats.json"  # next to the statistics of `demerge stats`: how each was made
MEASURED = "demerge.stats"  # in the metadata of each: what it was measured on
MADE = "demerge.stats.made"  # also there: all that stats.json says of it
MAX_DIFFERENCES = 12  # in one sentence


@cache
def installed(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package, for a record."""
    return {package: installed(package) for package in packages}


def list_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words which settings changed; those of nested values in `before` alone count."""
    before, now = dict(_flatten(before)), dict(_flatten(now))
    removed = sorted({name for name in before if "." in name} - now.keys())
    differences = []
    for name in [*now, *removed]:
        if before.get(name) != now.get(name):
            was = short(repr(before[name])) if name in before else "not recorded"
            differences.append(f"{short(name)} was {was}, now {short(repr(now.get(name)))}")
    return differences


def check_same_settings(
    path: Path, record: Mapping[str, Any], options: Mapping[str, Any], inputs: Mapping[str, Any]
) -> None:
    """Check that recorded work has the same options and inputs, and may be continued or reused.

    Raises:
        UsageError: if not, naming each difference with both values.
    """
    differences = list_differences(record.get("options", {}), options)
    differences += list_differences(record.get("inputs", {}), inputs)
    if differences:
        what = f"{path} was created with other settings: {'; '.join(differences[:MAX_DIFFERENCES])}"
        raise UsageError(what, fix="give the recorded values, or another output folder")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class Measured(Record):
    """What a statistic was measured on: the timesteps, and the SHA-256 of the model's content."""

    range: Span
    model_sha256: str
    data: str = ""
    data_fingerprint: str = ""

    @property
    def span(self) -> TimestepRange:
        """The range as a value."""
        return TimestepRange(*self.range)


class Made(Record):
    """How a statistic was made."""

    inputs: Measured
    options: Table = Field(default_factory=dict)
    facts: Table = Field(default_factory=dict)
    versions: Texts = Field(default_factory=dict)


class StatsRecord(Record):
    """A stats.json."""

    format: Literal["demerge.stats/1"] = "demerge.stats/1"
    fisher: Made | None = None
    gram: Made | None = None


def read_stats(folder: str | Path) -> dict[str, Made]:
    """Return how the statistics in a folder were made, by their names; empty without a record.

    Raises:
        InputError: if the record is damaged.
    """
    path = Path(folder) / STATS
    if not path.is_file():
        return {}
    fix = f"remove {path} and make the statistics again with `demerge stats`"
    record = read_record(path, StatsRecord, fix=fix)
    by_name = {"fisher": record.fisher, "gram": record.gram}
    return {name: made for name, made in by_name.items() if made is not None}


def made_as(folder: str | Path, name: str) -> Made | None:
    """Return how the statistic in a folder was made, by its own metadata or else stats.json.

    None without a record or a file.

    Raises:
        InputError: if the file or its record is damaged.
    """
    file = Path(folder) / f"{name}.safetensors"
    if not file.is_file():
        return None
    text = read_header(file).metadata.get(MADE)
    if text is None:
        return read_stats(folder).get(name)
    return parse_record(text, Made, f"{file}: {MADE}", fix=_how_to_make(file))


def measured_on(statistic: Checkpoint) -> Measured | None:
    """Return what a file of a statistic was measured on, by its metadata or else stats.json.

    None without a record.

    Raises:
        InputError: if the record is damaged.
    """
    file = statistic.place.files[0]
    text = statistic.metadata.get(MEASURED)
    if text is None:
        made = read_stats(file.parent).get(file.stem)
        return None if made is None else made.inputs
    return parse_record(text, Measured, f"{file}: {MEASURED}", fix=_how_to_make(file))


def _how_to_make(file: Path) -> str:
    return f"remove {file} and make it again with `demerge stats`"
