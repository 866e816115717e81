"""Evaluation: feature nets, distances between sets of images, losses per range, scores with their protocol, reports.

`compare(models, data)` does it all; it and the names below are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demerge.evaluation.comparison import compare
    from demerge.evaluation.planning import EvaluationOptions
    from demerge.evaluation.report.report import Report
    from demerge.evaluation.scores import Protocol, Scores

HOMES = {
    "EvaluationOptions": "planning",
    "Protocol": "scores",
    "Report": "report.report",
    "Scores": "scores",
    "compare": "comparison",
}

__all__ = ["EvaluationOptions", "Protocol", "Report", "Scores", "compare"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'demerge.evaluation' has no attribute {name!r}")
    return getattr(import_module(f"demerge.evaluation.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
