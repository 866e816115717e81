"""How many groups: as many as a budget of time holds, or as many as an error takes.

    SE of a map = median over neighbouring bins i, i+1 of SE(rho_{i,i+1}); infinite if unresolved

A boundary between ranges rests on it: do neighbours differ? Half of the neighbours are known at
least that well; the other half may hold bins that no number of groups would resolve. As the SE
falls like 1/sqrt(M) at least, M (SE/target)^2 groups would do. The decision is made after each
group, on the groups so far, from 5 on: the map of M groups is that of a fixed M.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from demerge.analysis.measurement.collector import products
from demerge.analysis.similarity import similarity
from demerge.conflict import Array, ConflictMap


@dataclass(slots=True)
class StopRule:
    """Ends a measurement: if one more group would not fit the budget, or if the SE is reached."""

    budget: float | None  # seconds, None for any
    target_se: float | None  # the SE that is enough, None for none
    took: Sequence[float]  # seconds of the groups that were measured, which the measurement adds to
    map: Callable[[Array], ConflictMap]  # makes a map of the rows' inner products [M N M N]
    width: int  # how many numbers of a row its products are made of
    began: float  # when, by the monotonic clock
    gram: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def __call__(self, rows: Tensor) -> bool:
        """Return whether the groups so far, rows [M N *], are enough."""
        left = math.inf if self.budget is None else self.began + self.budget - time.monotonic()
        if self.took and statistics.median(self.took) > left:
            return True
        if self.target_se is None:
            return False
        flat, known = rows[..., : self.width].flatten(0, 1), len(self.gram)
        block = products(flat[known:], flat)
        self.gram = np.block([[self.gram, block[:, :known].T], [block]])
        return neighbour_se(self.map(by_cell(self.gram, rows.shape[0]))) <= self.target_se


def by_cell(gram: Array, M: int) -> Array:
    """Return products [M N M N] of rows, group after group, as those of a map [N M N M]."""
    N = len(gram) // M
    return gram.reshape(M, N, M, N).transpose(1, 0, 3, 2)


def neighbour_se(map: ConflictMap) -> float:
    """Return the median SE of neighbouring bins' similarity; infinite if half are unresolved."""
    se = np.diagonal(similarity(map).cosine_se, 1)
    return float(np.median(np.where(np.isfinite(se), se, np.inf)))


def describe_se(map: ConflictMap, target: float) -> str:
    """Return whether a map reached the target SE, and how many groups would."""
    se = neighbour_se(map)
    if not math.isfinite(se):
        text = f"half of the neighbouring bins are not resolved after {map.M} groups"
        return f"{text}; larger batches or more groups may resolve them"
    text = f"the similarity of neighbouring bins has a median SE of {se:.3g} after {map.M} groups"
    if se <= target:
        return f"{text}; the target was {target:g}"
    needed = math.ceil(map.M * (se / target) ** 2)
    return f"{text}, not {target:g}; about {needed} groups would do"
