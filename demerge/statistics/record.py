"""Statistics on disk: FOLDER/fisher.safetensors, FOLDER/gram.safetensors, and stats.json, which says how each was made.

    stats.json   {"format", "fisher": {"inputs", "options", "facts", "versions"}, "gram": {the same}}

Each file of tensors says in its own metadata how it was made, so it comes into place with its record, and still says it where
it is copied to. stats.json repeats that for people, and is written last: it names nothing that is not there.
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
from demerge.storage.atomic import commit_json
from demerge.storage.checkpoint import commit_tensors
from demerge.timesteps import TimestepRange

FORMAT = "demerge.stats/1"
RECORD = STATS
STATISTICS = ("fisher", "gram")


def inputs_of(model_sha256: str, data: ImageData, span: TimestepRange) -> dict[str, Any]:
    """Return what a statistic is measured on, as JSON values."""
    return {
        "model_sha256": model_sha256,
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "range": [span.start, span.stop],
    }


def is_there(
    folder: Path, name: str, inputs: Mapping[str, Any], options: Mapping[str, Any]
) -> bool:
    """Return whether a folder holds this statistic.

    Raises:
        UsageError: where it holds one of other options or inputs, with both values.
        InputError: where it holds one of which nothing is recorded.
    """
    if not (folder / f"{name}.safetensors").is_file():
        return False
    record = made_as(folder, name)
    if record is None:
        raise InputError(
            f"{folder / name}.safetensors is not recorded in {RECORD}",
            fix="remove it, or choose another folder",
        )
    check_same_settings(
        folder / f"{name}.safetensors", record.model_dump(mode="json"), options, inputs
    )
    return True


def commit_statistic(
    folder: Path,
    name: str,
    collected: Collected,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Write a statistic into a folder, beside what it holds already, and then the record of all."""
    commit_measured(folder, name, collected, inputs, options)
    commit_stats(folder)


def commit_measured(
    folder: Path,
    name: str,
    collected: Collected,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Write a statistic into a folder; a stats.json that names another one of this name forgets that one first."""
    made = {
        "inputs": dict(inputs),
        "options": dict(options),
        "facts": dict(collected.facts),
        "versions": versions("demerge", "diffusers", "numpy", "torch"),
    }
    if name in read_stats(folder):
        _commit_record(
            folder, {other: record for other, record in read_stats(folder).items() if other != name}
        )
    metadata = {
        MEASURED: json.dumps(made["inputs"], sort_keys=True),
        MADE: json.dumps(made, sort_keys=True),
    }
    commit_tensors(folder / f"{name}.safetensors", collected.tensors, metadata)


def commit_stats(folder: Path) -> None:
    """Write the stats.json of the statistics in a folder, unless it says all of it already."""
    made = {name: record for name in STATISTICS if (record := made_as(folder, name)) is not None}
    if made != read_stats(folder):
        _commit_record(folder, made)


def _commit_record(folder: Path, made: Mapping[str, Made]) -> None:
    records = {
        name: record.model_dump(mode="json", exclude_unset=True) for name, record in made.items()
    }
    commit_json(folder / RECORD, {"format": FORMAT, **records})
