"""Blocks of bins that noise leaves to be told apart: cuts lie between them only.

A resolved bin (K_ii > 3 SE) is a block. A run of unresolved bins is merged from low t on into
blocks whose mean gradient is resolved, |gbar|^2 > 3 SE. What stays open at the end of the run joins
the last of them, or is one unresolved block if there is none. So no cut separates two unresolved
bins. If the resolved blocks cover less than half of [0, T), a cut would follow what could be
measured and not what conflicts, and none is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise

from demerge.analysis.similarity import RESOLVED, estimate_error
from demerge.conflict import Array
from demerge.errors import NumericalError

LEAST_KNOWN = 0.5


@dataclass(frozen=True, slots=True)
class Resolution:
    """Contiguous blocks of bins.

    Attributes:
        edges: indices of bins from 0 to N, one more than there are blocks.
        known: the share of [0, T) that resolved blocks cover.
    """

    edges: tuple[int, ...]
    known: float

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def is_enough(self) -> bool:
        """Whether resolved blocks cover half of [0, T)."""
        return self.known >= LEAST_KNOWN

    @property
    def reason(self) -> str:
        """What is resolved and what a cut needs, in words."""
        known = f"gradients are resolved on {self.known:.0%} of [0, T)"
        return f"{known}, and a cut needs {LEAST_KNOWN:.0%}"

    def check(self) -> None:
        """Check that there is enough to cut by.

        Raises:
            NumericalError: if resolved blocks cover less than half of [0, T).
        """
        if not self.is_enough:
            fix = "measure more groups or larger batches, or cut uniformly"
            raise NumericalError(self.reason, fix=fix)


def resolution(K: Array, pairs: Array, widths: Array) -> Resolution:
    """Find the finest blocks of a map, from K [N N], K without each pair [P N N] and w [N]."""
    N = len(K)

    def is_resolved(start: int, stop: int) -> bool:
        inside = slice(start, stop)
        w = widths[inside]
        error = estimate_error(pairs[:, inside, inside] @ w @ w)
        return bool(w @ K[inside, inside] @ w > RESOLVED * error.se)

    edges = [0]
    for single, run in groupby(range(N), lambda i: is_resolved(i, i + 1)):
        bins = list(run)
        if single:
            edges += [i + 1 for i in bins]
        else:
            edges += _merged(bins[0], bins[-1] + 1, is_resolved)
    known = sum(widths[a:b].sum() for a, b in pairwise(edges) if is_resolved(a, b))
    return Resolution(tuple(edges), float(known))


def _merged(start: int, stop: int, is_resolved: Callable[[int, int], bool]) -> list[int]:
    """Return the ends of the resolved blocks of a run of bins; the last is stretched to `stop`."""
    ends: list[int] = []
    for end in range(start + 1, stop + 1):
        if is_resolved(ends[-1] if ends else start, end):
            ends.append(end)
    return [*ends[:-1], stop]
