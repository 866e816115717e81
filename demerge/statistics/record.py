"""Statistics on disk: FOLDER/fisher.safetensors, FOLDER/gram.safetensors, and stats.json.

    stats.json   {"format", "fisher": RECORD, "gram": RECORD}
    RECORD       {"inputs", "options", "facts", "versions"}

The metadata of each file of tensors says how it was made. So it is never without its record, also
after it is copied. stats.json repeats the record for people. It is written last, so it names only
files that exist.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demerge.data import ImageData
from demerge.errors import InputError
from demerge.provenance import (
    MADE,
    MEASURED,
    STATS,
    Made,
    check_same_settings,
    made_as,
    read_stats,
    versions,
)
from demerge.statistics.examples import Collected
from demerge.statistics.options import STATISTICS
from demerge.storage.atomic import commit_json
from demerge.storage.checkpoint import commit_tensors
from demerge.timesteps import TimestepRange

FORMAT = "demerge.stats/1"
Values = Mapping[str, Any]


def inputs_of(model_sha256: str, data: ImageData, span: TimestepRange) -> dict[str, Any]:
    """Return what a statistic is measured on, as JSON values."""
    return {
        "model_sha256": model_sha256,
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "range": [span.start, span.stop],
    }


def has_statistic(folder: str | Path, name: str, inputs: Values, options: Values) -> bool:
    """Return whether a folder holds this statistic.

    Raises:
        UsageError: if it was made with other options or inputs, with both values.
        InputError: if nothing is recorded about it.
    """
    file = Path(folder) / f"{name}.safetensors"
    if not file.is_file():
        return False
    record = made_as(folder, name)
    if record is None:
        fix = f"remove {file}, or choose another folder"
        raise InputError(f"{file} is not recorded in {STATS}", fix=fix)
    check_same_settings(file, record.model_dump(mode="json"), options, inputs)
    return True


def commit_statistic(
    folder: str | Path, name: str, collected: Collected, inputs: Values, options: Values
) -> None:
    """Write a statistic into a folder, then the record of all statistics in it."""
    commit_measured(folder, name, collected, inputs, options)
    commit_stats(folder)


def commit_measured(
    folder: str | Path, name: str, collected: Collected, inputs: Values, options: Values
) -> None:
    """Write a statistic into a folder; a stats.json that names an older one is corrected first."""
    made = {
        "inputs": dict(inputs),
        "options": dict(options),
        "facts": dict(collected.facts),
        "versions": versions("demerge", "diffusers", "numpy", "torch"),
    }
    records = read_stats(folder)
    if records.pop(name, None) is not None:
        _commit_records(folder, records)
    metadata = {
        MEASURED: json.dumps(made["inputs"], sort_keys=True),
        MADE: json.dumps(made, sort_keys=True),
    }
    commit_tensors(Path(folder) / f"{name}.safetensors", collected.tensors, metadata)


def commit_stats(folder: str | Path) -> None:
    """Write the stats.json of the statistics in a folder, unless it is up to date."""
    made = {name: record for name in STATISTICS if (record := made_as(folder, name)) is not None}
    if made != read_stats(folder):
        _commit_records(folder, made)


def _commit_records(folder: str | Path, made: Mapping[str, Made]) -> None:
    document: dict[str, Any] = {"format": FORMAT}
    for name, record in made.items():
        document[name] = record.model_dump(mode="json", exclude_unset=True)
    commit_json(Path(folder) / STATS, document)
