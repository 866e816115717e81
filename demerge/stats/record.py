"""Statistics on disk: FOLDER/fisher.safetensors, FOLDER/gram.safetensors, and stats.json, which says how each was made.

    stats.json   {"format", "fisher": {"inputs", "options", "facts", "versions"}, "gram": {the same}}

The record is written before the tensors, so that tensors without a record are of another origin. What they were measured on
is in their own metadata too, so that a file that is copied elsewhere still says it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demerge.data import ImageData
from demerge.errors import InputError
from demerge.files import commit_json
from demerge.records import MEASURED, STATS, read_stats, refuse_differences, versions
from demerge.stats.examples import Collected
from demerge.timesteps import TimestepRange
from demerge.weights import commit_tensors

FORMAT = "demerge.stats/1"
RECORD = STATS


def inputs_of(model_sha256: str, data: ImageData, span: TimestepRange) -> dict[str, Any]:
    """Return what a statistic is measured on, as JSON values."""
    return {
        "model_sha256": model_sha256,
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "range": [span.start, span.stop],
    }


def is_there(folder: Path, name: str, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Return whether a folder holds this statistic.

    Raises:
        UsageError: where it holds one of other options or inputs, with both values.
        InputError: where it holds one of which nothing is recorded.
    """
    if not (folder / f"{name}.safetensors").is_file():
        return False
    record = read_stats(folder).get(name)
    if record is None:
        raise InputError(f"{folder / name}.safetensors is not recorded in {RECORD}", fix="remove it, or choose another folder")
    refuse_differences(folder / f"{name}.safetensors", record.model_dump(mode="json"), options, inputs)
    return True


def commit_statistic(
    folder: Path, name: str, collected: Collected, inputs: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Write a statistic and its record into a folder, beside what it holds already."""
    made = {
        "inputs": dict(inputs),
        "options": dict(options),
        "facts": dict(collected.facts),
        "versions": versions("demerge", "diffusers", "numpy", "torch"),
    }
    others = {other: record.model_dump(mode="json", exclude_unset=True) for other, record in read_stats(folder).items()}
    commit_json(folder / RECORD, {"format": FORMAT, **others, name: made})
    commit_tensors(folder / f"{name}.safetensors", collected.tensors, {MEASURED: json.dumps(made["inputs"], sort_keys=True)})
