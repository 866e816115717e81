"""Evaluation: feature nets, distances between sets of images, losses per range, scores, reports.

`evaluate(models, data)` does it all. The names below are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from demerge.lazy import lazily

if TYPE_CHECKING:
    from demerge.evaluation.options import EvaluationOptions as EvaluationOptions
    from demerge.evaluation.planning import evaluate as evaluate
    from demerge.evaluation.report.report import Report as Report
    from demerge.evaluation.scores import Protocol as Protocol
    from demerge.evaluation.scores import Scores as Scores

HOMES = {
    "EvaluationOptions": "options",
    "Protocol": "scores",
    "Report": "report.report",
    "Scores": "scores",
    "evaluate": "planning",
}
__all__ = list(HOMES)
__getattr__, __dir__ = lazily(__name__, HOMES)
