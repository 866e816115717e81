"""How many groups: as many as a budget of time holds, or as many as an error takes.

    SE of a map = median over neighbouring bins i, i+1 of SE(rho_{i,i+1}), infinite where a bin is unresolved

It is what a cut rests on: whether neighbours differ. Half of the neighbours are known at least that well; the other half may
hold bins that no number of groups would resolve. As the SE falls like 1/sqrt(M) at least, M (SE/target)^2 groups would do.
The decision is taken after each group, on the groups so far, from 5 on: the map of M groups is that of a fixed M.
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
class Stop:
    """Ends a measurement: when one more group would not fit the budget, or when the SE is reached.

    Attributes:
        budget: seconds, None for any.
        se: the SE that is enough, None for none.
        took: seconds of the groups that were measured, which the measurement adds to.
        map: makes a map of the rows' inner products [M N M N].
        width: how many numbers of a row its products are made of.
        began: when, by the monotonic clock.
    """

    budget: float | None
    se: float | None
    took: Sequence[float]
    map: Callable[[Array], ConflictMap]
    width: int
    began: float
    gram: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def __call__(self, rows: Tensor) -> bool:
        """Whether the groups so far, rows [M N *], are enough."""
        return self._late() or self._sure(rows)

    def _late(self) -> bool:
        if self.budget is None or not self.took:
            return False
        return time.monotonic() - self.began + statistics.median(self.took) > self.budget

    def _sure(self, rows: Tensor) -> bool:
        if self.se is None:
            return False
        flat, known = rows[..., : self.width].flatten(0, 1), len(self.gram)
        block = products(flat[known:], flat)
        self.gram = np.block([[self.gram, block[:, :known].T], [block]])
        return neighbour_se(self.map(by_cell(self.gram, rows.shape[0]))) <= self.se


def by_cell(gram: Array, M: int) -> Array:
    """Return products [M N M N] of rows of groups, one after the other, as those of a map [N M N M]."""
    N = len(gram) // M
    return gram.reshape(M, N, M, N).transpose(1, 0, 3, 2)


def neighbour_se(map: ConflictMap) -> float:
    """Return the median over neighbouring bins of the SE of their similarity; infinite where half of them are unresolved."""
    se = np.diagonal(similarity(map).cosine_se, 1)
    return float(np.median(np.where(np.isfinite(se), se, np.inf)))


def said(map: ConflictMap, target: float) -> str:
    """Say whether a map is as sure as was asked, and how many groups would be."""
    found = neighbour_se(map)
    what = (
        f"the similarity of neighbouring bins has a median SE of {found:.3g} after {map.M} groups"
    )
    if found <= target:
        return f"{what}, {target:g} was asked"
    if not math.isfinite(found):
        return f"half of the neighbouring bins are not resolved after {map.M} groups: larger batches or more groups may"
    return (
        f"{what}, not {target:g}: about {math.ceil(map.M * (found / target) ** 2)} groups would do"
    )
