"""Short reprs of values with many fields."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


def stated(value: Any) -> str:
    """Return a dataclass as its name and those of its fields that are not at their defaults."""
    values = {field.name: getattr(value, field.name) for field in fields(value)}
    given = [
        f"{field.name}={values[field.name]!r}"
        for field in fields(value)
        if values[field.name] != field.default
    ]
    return f"{type(value).__name__}({', '.join(given)})"
