"""The reading of a map: what all questions about it share, computed at first use and remembered.

A function of a reading that is marked `once` stores its results there too, so that verdict,
summary, plots and page take the same numbers without computing them again.

    ES(ranges) = J(ranges) / J(blocks)     0: no more than one range; 1: as much as all blocks apart

ES, the explained share, does not change with the length of the gradients, so that models can be
compared. Noise can carry its estimate out of [0, 1], where it is cut off. ES of a partition on the
data that chose it flatters it: see cross_validation.py. Blocks and the scales of bins are those of
the whole map. Partitions are compared at the nearest edges of bins. Errors are those of
similarity.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from demerge.analysis import similarity as statistics
from demerge.analysis.partitioning.objective import (
    ADAPTIVE,
    METHODS,
    SCORES,
    Objective,
    adaptive_edges,
    check_choice,
    fixed_partition,
    least_width,
    nearest_edges,
    on_bins,
)
from demerge.analysis.partitioning.resolution import Resolution, resolution
from demerge.analysis.partitioning.search import Edges, no_partition, total
from demerge.analysis.similarity import RESOLVED, Estimate, Similarity, estimate_error
from demerge.conflict import Array, ConflictMap
from demerge.errors import UsageError
from demerge.timesteps import Partition

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Reading:
    """A map with one score and least width of a range, and what it says of partitions.

    Attributes:
        score: `step`, `energy` or `cosine`, what partitions maximise.
        minimum: least width of a range in bins, for methods that look at the map; None is a
            twentieth of [0, T).
    """

    map: ConflictMap
    score: str = "step"
    minimum: int | None = None
    _results: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORES)

    @classmethod
    def of(cls, map: ConflictMap | Reading) -> Reading:
        """Return the reading of a map, or the reading itself."""
        return map if isinstance(map, cls) else cls(map)  # type: ignore[arg-type]

    @property
    def least_width(self) -> int:
        """The least width of a range in bins."""
        return least_width(self.map.N) if self.minimum is None else self.minimum

    @cached_property
    def bins(self) -> Similarity:
        """Similarity of the bins, with errors."""
        return statistics.similarity(self.map)

    @cached_property
    def pairs(self) -> Array:
        """K without each pair of groups, [P N N]."""
        return statistics.without_pair(self.map)

    @cached_property
    def objective(self) -> Objective:
        """J of the score."""
        return Objective.of(self.map, self.score, self.bins)

    @cached_property
    def blocks(self) -> Resolution:
        """The blocks of bins that cuts may lie between."""
        return resolution(self.bins.K, self.pairs, self.map.widths)

    @cached_property
    def tables(self) -> tuple[Array, Array]:
        """The table of v of K [N+1 N+1], and of K without each pair of groups [P N+1 N+1]."""
        return self.objective.table(self.bins.K), self.objective.table(self.pairs)

    def estimate(self, statistic: Callable[[Array], Array]) -> Estimate:
        """Return statistic(K) with its error; it takes [* N N] and gives [*]."""
        error = estimate_error(statistic(self.pairs))
        return Estimate(float(statistic(self.bins.K)), float(error.se))

    @cached_property
    def conflict(self) -> Estimate:
        """J of all blocks apart, the most that cuts between them can gain."""
        J, without = self._gains(self.blocks.edges)
        return Estimate(float(J), float(estimate_error(without).se))

    def _gains(self, edges: Sequence[int]) -> tuple[Array, Array]:
        J, without = (total(table, edges) - table[..., 0, -1] for table in self.tables)
        return J, without

    @property
    def is_sure(self) -> bool:
        """Whether there is a conflict to explain, on the larger part of [0, T)."""
        return self.blocks.is_enough and self.conflict.above(RESOLVED)

    @property
    def doubt(self) -> str:
        """Why a map that is not sure of its conflict gives nothing to cut by."""
        return (
            "no conflict between bins is resolved" if self.blocks.is_enough else self.blocks.reason
        )

    @cached_property
    def is_converged(self) -> bool:
        """Whether noise hides the joint gradient: then every row of K sums to 0."""
        w = self.map.widths
        joint = w @ self.bins.K @ w
        return bool(joint <= estimate_error(self.pairs @ w @ w).half())

    def explained_share(self, partition: Partition) -> Estimate:
        """Return ES of a partition, in [0, 1], at the nearest edges of bins."""
        J, without = self._gains(nearest_edges(self.map, partition))
        most, most_without = self._gains(self.blocks.edges)
        error = estimate_error(without / most_without)
        return Estimate(float(np.clip(J / most, 0, 1)), float(error.se))

    def edges(self, table: Array, counts: Sequence[int], method: str = "gradient") -> list[Edges]:
        """Return the edges [* n+1] that a method finds in tables of v between the map's blocks."""
        return adaptive_edges(table, counts, self.blocks.edges, method, self.least_width)

    def partition(self, n: int, method: str = "gradient") -> Partition:
        """Return n ranges, found by a method.

        Raises:
            UsageError: if an argument is out of its range.
            NumericalError: if noise leaves too few blocks of bins, or less than half of [0, T).
        """
        check_choice("method", method, METHODS)
        if not 1 <= n <= self.map.T:
            fix = f"give 1 <= n <= {self.map.T}"
            raise UsageError(f"cannot cut {self.map.T} timesteps into {n} ranges", fix=fix)
        if n == 1:
            return Partition.uniform(self.map.T, 1)
        if method not in ADAPTIVE:
            return fixed_partition(self.map, n, method)
        self.blocks.check()
        (edges,) = self.edges(self.tables[0], [n], method)
        if edges[-2] == edges[-1]:
            raise no_partition(self.blocks.edges, n, self.least_width)
        return on_bins(self.map, edges)


def once(function: Callable[Concatenate[Reading, P], R]) -> Callable[Concatenate[Reading, P], R]:
    """Make a function of a reading keep its result for each list of arguments in the reading."""

    @wraps(function)
    def remembered(reading: Reading, /, *arguments: P.args, **keywords: P.kwargs) -> R:
        key = (function.__module__, function.__qualname__, arguments, *sorted(keywords.items()))
        if key not in reading._results:
            reading._results[key] = function(reading, *arguments, **keywords)
        result: R = reading._results[key]
        return result

    return remembered


def partition(
    map: ConflictMap,
    n: int = 4,
    method: str = "gradient",
    *,
    score: str = "step",
    minimum: int | None = None,
) -> Partition:
    """Partition [0, T) into n ranges: `Reading.partition` of a reading with this score and minimum.

    Args:
        method: `gradient` (maximise J on the map), `hierarchical` (split where J gains most, again
            and again), `uniform` (equal widths), `logsnr` (equal widths in log SNR).
        score: `step`, `energy` or `cosine`, for methods that look at the map.
        minimum: least width of a range in bins, for these methods; None is a twentieth of [0, T).
    """
    return Reading(map, score, minimum).partition(n, method)
