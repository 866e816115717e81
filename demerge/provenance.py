"""What the records of all stages share: versions, whether a record agrees with what is asked now, what a statistic is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from demerge.errors import UsageError
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.safetensors_header import read_header
from demerge.storage.schema import Record, Span, Table, Texts, parse_record, read_record, short
from demerge.timesteps import TimestepRange

STATS = "stats.json"  # beside the statistics of `demerge stats`: how each was made
MOST = 12  # differences in one sentence
MEASURED = "demerge.stats"  # in the metadata of each: what it was measured on
MADE = "demerge.stats.made"  # likewise: all that stats.json says of it


def installed(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package, for a record."""
    return {package: installed(package) for package in packages}


def check_same_settings(
    where: Path, record: Mapping[str, Any], options: Mapping[str, Any], inputs: Mapping[str, Any]
) -> None:
    """Refuse to continue or reuse work that was begun with other options or inputs.

    Raises:
        UsageError: naming each difference with both values.
    """
    differences = []
    for there, now in ((record.get("options", {}), options), (record.get("inputs", {}), inputs)):
        there, now = dict(_flat(there)), dict(_flat(now))
        gone = {name for name in there if "." in name} - now.keys()  # a part of a nested value
        differences += [
            f"{short(name)}: recorded {short(repr(there.get(name)))}, now {short(repr(now.get(name)))}"
            for name in [*now, *sorted(gone)]
            if there.get(name) != now.get(name)
        ]
    if differences:
        raise UsageError(
            f"{where} was made otherwise: " + "; ".join(differences[:MOST]),
            fix="give the recorded values, or another output folder",
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
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


def read_stats(folder: Path) -> dict[str, Made]:
    """Return how the statistics in a folder were made, by their names; nothing where there is no record.

    Raises:
        InputError: where the record is damaged.
    """
    path = folder / STATS
    if not path.is_file():
        return {}
    record = read_record(
        path, StatsRecord, fix=f"remove {path} and make the statistics again with `demerge stats`"
    )
    return {
        name: made for name in ("fisher", "gram") if (made := getattr(record, name)) is not None
    }


def made_as(folder: Path, name: str) -> Made | None:
    """Return how the statistic in a folder was made, by its own metadata or else stats.json; None without a record or a file.

    Raises:
        InputError: if the file or its record is damaged.
    """
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        return None
    text = read_header(file).metadata.get(MADE)
    if text is None:
        return read_stats(folder).get(name)
    return parse_record(
        text, Made, f"{file}: {MADE}", fix=f"remove {file} and make it again with `demerge stats`"
    )


def measured_on(statistic: Checkpoint) -> Measured | None:
    """Return what a file of a statistic was measured on, by its metadata or else the record beside it; None without a record.

    Raises:
        InputError: where the record is damaged.
    """
    file = statistic.place.files[0]
    text = statistic.metadata.get(MEASURED)
    if text is None:
        made = read_stats(file.parent).get(file.stem)
        return None if made is None else made.inputs
    return parse_record(
        text,
        Measured,
        f"{file}: {MEASURED}",
        fix=f"remove {file} and make it again with `demerge stats`",
    )
