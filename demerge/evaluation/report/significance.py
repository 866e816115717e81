"""Which differences between models count: paired t tests over the seeds, with Holm's correction.

    differences     d_s = model - control on seed s, on common noise              [S]
    t test          t = mean(d) / (sd(d) / sqrt(S)),  S - 1 degrees of freedom, two sides
    Holm            p_(1) <= ... <= p_(m);
                    adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j))

The family is every pair of a model with a base or a joint control, and of a merge with a routed
ensemble. It holds all of them, so that choosing the best merge or the best control afterwards is
covered. Under equal models a table holds a false verdict with a probability of at most 5 %, and the
power rises with the seeds. A verdict is about the checkpoints that were scored.

There is no verdict below three common seeds, or if the images do not span the features; `why` says
so instead.

Paper: Holm, A simple sequentially rejective multiple test procedure (Scandinavian Journal of
Statistics, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit

from demerge.evaluation.scores import HIGHER_IS_BETTER, Key, Kind, Row, check_same_protocol

Verdict = Literal["better", "worse", "inconclusive", "none"]
Comparisons = Mapping[tuple[Key, Key], "Comparison"]
LEVEL = 0.05
LEAST_SEEDS = 3
CONTROLS: dict[Kind, str] = {"base": "the base", "joint": "the joint control"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against a control.

    Attributes:
        difference: the mean of model minus control over their common seeds, in the metric's unit.
        relative: the same as a share of the control's mean.
        p: the adjusted p, NaN without a test.
        family: the number of comparisons that the table makes.
        verdict: `none` if nothing was tested; then `why` says the reason.
    """

    difference: float
    relative: float
    p: float
    family: int
    verdict: Verdict
    why: str = ""

    @property
    def word(self) -> str:
        """The verdict, or the reason why there is none."""
        return self.why or self.verdict


def paired_p(differences: ArrayLike) -> NDArray[np.float64]:
    """Return the two-sided p [*] of a t test that paired differences [* S] have the mean 0."""
    d = np.asarray(differences, dtype=np.float64)
    seeds, size = d.shape[-1], np.abs(d.mean(-1))
    error = d.std(-1, ddof=1) / math.sqrt(seeds)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(size == 0, 0.0, size / error)
    return np.asarray(2 * stdtr(seeds - 1, -t))


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Return the p adjusted by Holm's method, [* m] for a family of m tests."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, axis=-1)
    ranked = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(ranked, axis=-1), 1)
    return np.take_along_axis(adjusted, np.argsort(order, axis=-1), -1)


def detectable(seeds: int, family: int) -> float:
    """Return the mean paired difference, in sd, from which the surest of a family counts."""
    return float(stdtrit(seeds - 1, 1 - LEVEL / family / 2)) / math.sqrt(seeds)


def compare_rows(rows: Sequence[Row], metric: str = "fd") -> Comparisons:
    """Compare every model of a table with every control; keys are (model, control)."""
    pairs = []
    for a, b in combinations(rows, 2):
        if {a.kind, b.kind} & CONTROLS.keys() or {a.kind, b.kind} == {"merge", "ensemble"}:
            pairs.append((a, b))
    check_same_protocol(rows)
    values = [_paired_values(a, b, metric) for a, b in pairs]
    reasons = [_untested(a, pair) for (a, _), pair in zip(pairs, values, strict=True)]
    tested = [i for i, why in enumerate(reasons) if not why]
    p = np.full(len(pairs), math.nan)
    if tested:
        p[tested] = holm([paired_p(values[i][0] - values[i][1]) for i in tested])
    comparisons = {}
    for i, (a, b) in enumerate(pairs):
        for x, y, sides in ((a, b, values[i]), (b, a, values[i][::-1])):
            made = _comparison(sides, metric, float(p[i]), len(tested), reasons[i])
            comparisons[x.key, y.key] = made
    return comparisons


def _paired_values(a: Row, b: Row, metric: str) -> NDArray[np.float64]:
    """Return the values [2 S] of two rows on their common seeds."""
    own, other = a.by_seed(metric), b.by_seed(metric)
    common = [seed for seed in own if seed in other]
    return np.array([[values[seed] for seed in common] for values in (own, other)])


def _untested(row: Row, values: NDArray[np.float64]) -> str:
    """Return why a pair cannot be tested, "" if it can."""
    seeds = values.shape[1]
    if row.protocol.is_rank_deficient:
        return "rank-deficient"
    if seeds < LEAST_SEEDS:
        return f"{seeds} common seed{'s' if seeds != 1 else ''} of {LEAST_SEEDS}"
    return ""


def _comparison(
    values: NDArray[np.float64], metric: str, p: float, family: int, why: str
) -> Comparison:
    own, other = values
    difference = float((own - other).mean()) if own.size else math.nan
    level = abs(float(other.mean())) if own.size else math.nan
    relative = difference / level if level else math.nan
    is_improved = (difference > 0) == (metric in HIGHER_IS_BETTER)
    verdict: Verdict = "better" if is_improved else "worse"
    if why:
        verdict = "none"
    elif not p < LEVEL:
        verdict = "inconclusive"
    return Comparison(difference, relative, p, family, verdict, why)
