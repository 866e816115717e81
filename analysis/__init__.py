"""Gradient analysis: measure the conflict map of a base, read it, cut it, draw it.

measure(model, data)        -> ConflictMap       gradients.py
cut(map, n)                 -> Partition         segmentation.py
summary(map, n)             -> what to believe   report.py
figures(map, partition)     -> matplotlib        plots.py
"""

from __future__ import annotations

from demerge.analysis.gradients import Cost, cost, measure
from demerge.analysis.report import lines, summary, write
from demerge.analysis.segmentation import METHODS, SCORES, cut

__all__ = ["METHODS", "SCORES", "Cost", "cost", "cut", "lines", "measure", "summary", "write"]
