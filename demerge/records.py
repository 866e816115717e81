"""What the records of all stages share: versions, whether a record agrees with what is asked now, what a statistic is of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from demerge.errors import InputError, UsageError
from demerge.headers import read_json
from demerge.timesteps import TimestepRange
from demerge.weights import Checkpoint

STATS = "stats.json"  # beside the statistics of `demerge stats`: how each was made
MEASURED = "demerge.stats"  # in the metadata of each: what it was measured on


def installed(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package, for a record."""
    return {package: installed(package) for package in packages}


def refuse_differences(where: Path, record: Mapping[str, Any], options: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Refuse to continue or reuse work that was begun with other options or inputs.

    Raises:
        UsageError: naming each difference with both values.
    """
    pairs = [("options", options), ("inputs", inputs)]
    differences = [
        f"{name}: recorded {record.get(part, {}).get(name)!r}, now {value!r}"
        for part, values in pairs
        for name, value in values.items()
        if record.get(part, {}).get(name) != value
    ]
    if differences:
        raise UsageError(
            f"{where} was made otherwise: " + "; ".join(differences),
            fix="give the recorded values, or another output folder",
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """What a statistic was measured on: the timesteps, and the SHA-256 of the model's content."""

    range: TimestepRange
    model: str


def measured_on(statistic: Checkpoint) -> Measured | None:
    """Return what a file of a statistic was measured on, by its metadata or else the record beside it; None without a record.

    Raises:
        InputError: where the record is damaged.
    """
    file = statistic.place.files[0]
    text = statistic.metadata.get(MEASURED)
    table = read_json(file.parent / STATS) if text is None and (file.parent / STATS).is_file() else {}
    if text is None and file.stem not in table:
        return None
    try:
        inputs = json.loads(text) if text is not None else table[file.stem]["inputs"]
        start, stop = inputs["range"]
        return Measured(TimestepRange(int(start), int(stop)), str(inputs["model_sha256"]))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, UsageError) as error:
        where = file.parent / STATS if text is None else file
        fix = f"remove {file} and make it again with `demerge stats`"
        raise InputError(f"{where}: no range and model in the record of {file.stem}", fix=fix) from error
