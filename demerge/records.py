"""What the records of all stages share: versions, and whether a record agrees with what is asked now."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from demerge.errors import UsageError


def installed(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


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
