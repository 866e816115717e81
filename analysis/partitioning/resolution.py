"""Blocks of bins between which cuts may lie, given what noise leaves to be known.

A resolved bin (K_ii > 3 SE) is a block. A run of unresolved bins is merged from low t on into blocks whose mean gradient is
resolved, |gbar|^2 > 3 SE; what stays open at the end of the run joins the last of them, or is one unresolved block where there
is none. So no cut separates two unresolved bins. Where the resolved blocks cover less than half of [0, T), a cut would follow
what could be measured and not what conflicts, and none is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise

from demerge.analysis.similarity import RESOLVED, cross, error, kernel, without_pair
from demerge.conflict import ConflictMap
from demerge.errors import NumericalError

LEAST_KNOWN = 0.5


@dataclass(frozen=True, slots=True)
class Blocks:
    """Contiguous blocks of bins.

    Attributes:
        edges: indices of bins from 0 to N, one more than there are blocks.
        known: the share of [0, T) that resolved blocks cover.
    """

    edges: tuple[int, ...]
    known: float

    def __len__(self) -> int:
        return len(self.edges) - 1

    def require_known(self) -> Blocks:
        """Return self.

        Raises:
            NumericalError: where resolved blocks cover less than half of [0, T).
        """
        if self.known < LEAST_KNOWN:
            raise NumericalError(
                f"gradients are resolved on {self.known:.0%} of [0, T), and a cut needs {LEAST_KNOWN:.0%}",
                fix="measure more groups or larger batches, or take the uniform cut",
            )
        return self


def blocks(map: ConflictMap) -> Blocks:
    """Find the finest blocks of a map."""
    K, pairs = kernel(map, cross(map.M)), without_pair(map)

    def resolved(start: int, stop: int) -> bool:
        inside = slice(start, stop)
        w = map.widths[inside]
        return bool(
            w @ K[inside, inside] @ w > RESOLVED * error(pairs[:, inside, inside] @ w @ w).se
        )

    edges = [0]
    for single, run in groupby(range(map.N), lambda i: resolved(i, i + 1)):
        bins = list(run)
        edges += [i + 1 for i in bins] if single else _merged(bins[0], bins[-1] + 1, resolved)
    known = sum(map.widths[a:b].sum() for a, b in pairwise(edges) if resolved(a, b))
    return Blocks(tuple(edges), float(known))


def _merged(start: int, stop: int, resolved: Callable[[int, int], bool]) -> list[int]:
    """Return the ends of the resolved blocks of a run [start, stop) of unresolved bins, the last one stretched to `stop`."""
    ends: list[int] = []
    for end in range(start + 1, stop + 1):
        if resolved(ends[-1] if ends else start, end):
            ends.append(end)
    return [*ends[:-1], stop]
