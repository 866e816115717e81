"""Gradient analysis: measure the conflict map of a base, read it, cut it, draw it.

measurement/   gradients by bin and group       measure(model, data) -> ConflictMap
similarity     of bins, unbiased, with errors
cutting/       into ranges, and its evidence     cut(map, n) -> Partition, count(map) -> how many ranges
report         what to believe, and its files    summary(map, n), write(map, out, summary)
verdict        what a map says and what to do, from one rule, for analyze, ranges and the page
page, next     conflict.html: all of it for a person, and what to do next
plots          of a map                          figures(map, partition) -> matplotlib
experts/       what experts do to their base: task vectors, losses, outputs, weights to merge by
study/         which estimator is to be believed

Names below are imported when first used: a stored map is read and cut without what measures one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demerge.analysis.measurement.gradients import Measurement
    from demerge.analysis.measurement.options import MeasurementOptions
    from demerge.analysis.measurement.run import measure
    from demerge.analysis.partitioning.cross_validation import count
    from demerge.analysis.partitioning.objective import METHODS, SCORES, cut
    from demerge.analysis.report.text import lines, summary, write

HOMES = {
    "METHODS": "partitioning.objective",
    "SCORES": "partitioning.objective",
    "Measurement": "measurement.gradients",
    "MeasurementOptions": "measurement.options",
    "count": "partitioning.cross_validation",
    "cut": "partitioning.objective",
    "lines": "report.text",
    "measure": "measurement.run",
    "summary": "report.text",
    "write": "report.text",
}

__all__ = [
    "METHODS",
    "SCORES",
    "Measurement",
    "MeasurementOptions",
    "count",
    "cut",
    "lines",
    "measure",
    "summary",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'demerge.analysis' has no attribute {name!r}")
    return getattr(import_module(f"demerge.analysis.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
