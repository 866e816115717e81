"""Gradient analysis: measure the conflict map of a base, read it, cut it, draw it.

measure(model, data)        -> ConflictMap       gradients.py
cut(map, n)                 -> Partition         segmentation.py
count(map)                  -> how many ranges   crossfit.py
summary(map, n)             -> what to believe   report.py
figures(map, partition)     -> matplotlib        plots.py
task_vectors(base, experts) -> norms, angles     taskvectors.py
loss_path, loss_plane       -> loss around it    landscape.py
errors(known problem)       -> who is biased     study.py, known.py
prepare(base, experts)      -> weights to merge  balance.py (responses.py measures, coefficients.py solves)

Names below are imported when first used: a stored map is read and cut without what measures one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demerge.analysis.crossfit import count
    from demerge.analysis.gradients import Cost, Measurement, Settings, measure
    from demerge.analysis.report import lines, summary, write
    from demerge.analysis.segmentation import METHODS, SCORES, cut

HOMES = {
    "METHODS": "segmentation",
    "SCORES": "segmentation",
    "Cost": "gradients",
    "Measurement": "gradients",
    "Settings": "gradients",
    "count": "crossfit",
    "cut": "segmentation",
    "lines": "report",
    "measure": "gradients",
    "summary": "report",
    "write": "report",
}

__all__ = ["METHODS", "SCORES", "Cost", "Measurement", "Settings", "count", "cut", "lines", "measure", "summary", "write"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'demerge.analysis' has no attribute {name!r}")
    return getattr(import_module(f"demerge.analysis.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
