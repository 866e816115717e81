"""Gradient analysis: measure the conflict map of a base, read it, partition it, draw it.

measurement/    gradients by bin and group       measure(model, data) -> ConflictMap
similarity      of bins, unbiased, with errors   similarity(map) -> Similarity
partitioning/   into ranges, and its evidence    partition(map, n) -> Partition
report/         the conclusion and its files     summarize(Reading(map), n) -> ConflictSummary
layers/         which layers conflict
experts/        what experts do to their base: task vectors, losses, outputs, weights to merge by
planning/       what each command of the analysis runs: plan(options) -> Plan, run, result
study/          which estimator is to be believed

The names below are imported when first used: reading a stored map does not import torch models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from demerge.lazy import lazily

if TYPE_CHECKING:
    from demerge.analysis.measurement.gradients import Measurement
    from demerge.analysis.measurement.options import MeasurementOptions
    from demerge.analysis.measurement.run import measure
    from demerge.analysis.partitioning.cross_validation import count_ranges
    from demerge.analysis.partitioning.map_reading import Reading, partition
    from demerge.analysis.partitioning.objective import METHODS, SCORES
    from demerge.analysis.report.page import write_report
    from demerge.analysis.report.summary import ConflictSummary, summarize

HOMES = {
    "METHODS": "partitioning.objective",
    "SCORES": "partitioning.objective",
    "ConflictSummary": "report.summary",
    "Measurement": "measurement.gradients",
    "MeasurementOptions": "measurement.options",
    "Reading": "partitioning.map_reading",
    "count_ranges": "partitioning.cross_validation",
    "measure": "measurement.run",
    "partition": "partitioning.map_reading",
    "summarize": "report.summary",
    "write_report": "report.page",
}

__all__ = [
    "METHODS",
    "SCORES",
    "ConflictSummary",
    "Measurement",
    "MeasurementOptions",
    "Reading",
    "count_ranges",
    "measure",
    "partition",
    "summarize",
    "write_report",
]

__getattr__, __dir__ = lazily(__name__, HOMES)
