"""Evaluation: feature nets, distances between sets of images, losses per range, scores with their protocol, reports.

`compare(models, data)` does it all; it and the names below are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demerge.evaluate.comparison import compare
    from demerge.evaluate.prepare import EvaluationOptions
    from demerge.evaluate.protocol import Protocol, Scores
    from demerge.evaluate.report import Report

HOMES = {
    "EvaluationOptions": "prepare",
    "Protocol": "protocol",
    "Report": "report",
    "Scores": "protocol",
    "compare": "comparison",
}

__all__ = ["EvaluationOptions", "Protocol", "Report", "Scores", "compare"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'demerge.evaluate' has no attribute {name!r}")
    return getattr(import_module(f"demerge.evaluate.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
