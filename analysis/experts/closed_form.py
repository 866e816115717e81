"""Merge coefficients in closed form, from how a base's outputs answer to its experts.

    dL(w) = sum_R q_R dL_R(w) = b.w + w A w,     q_R = |R|/T, or |R|/T / L_R with `relative`
    w*    = -1/2 (A + rho diag A)^-1 b         by one eigendecomposition of A for all rho

w* is the least-squares solution of sum_p w_p u_p = -r over all timesteps. What two experts do alike
is counted once. Where they pull apart, the ranges' losses decide. rho shrinks all weights towards
0, in units in which scaling a task vector changes nothing. If none is given, it is the one of
RIDGES whose weights, fitted without a group, serve that group best. An expert that does not change
the outputs has weight 0.

The loss on the samples that chose w flatters it, so the prediction is cross-fitted: the change on
group m is that of weights fitted, rho included, on the other groups. Its SE is the jackknife's over
groups, SE^2 = (M-1)/M sum_g (theta_(g) - mean)^2, where theta_(g) is cross-fitted anew without
group g (for the rho found with it). Without that, its interval (Student's t, M - 1 degrees of
freedom) covers the truth in 82 % of noisy cases and not in 94 %. What the quadratic form does not
see at w* is measured (`responses.measure_bend`) and added. If the interval covers 0, no gain is
promised.

A weight of 0 is the base, of 1 the expert. Outside INTERVAL = [-1, 2] a weight goes further from
both than they are from each other, and no response was measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from demerge.analysis.experts.responses import Responses
from demerge.analysis.similarity import standard_error, t_quantile
from demerge.conflict import Array

RIDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
INTERVAL = (-1.0, 2.0)
RESOLUTION = 1e-6  # of products of float32 outputs, at unit diagonal
Bend = Callable[[Array], Array]


@dataclass(frozen=True, slots=True)
class Change:
    """A change of loss relative to a loss, its standard error, and half of its 95 % interval."""

    value: float
    se: float
    half: float

    @classmethod
    def of(cls, change: Array, loss: Array, without: Array | None = None) -> Change:
        """Return sum_m change_m / sum_m loss_m of M groups [M], with the jackknife's error.

        Row g of `without` [M M] is the change without group g; `change` itself by default.
        """
        rows = np.broadcast_to(change, (len(change),) * 2) if without is None else without
        se = float(standard_error((rows.sum(1) - np.diagonal(rows)) / (loss.sum() - loss)))
        return cls(float(change.sum() / loss.sum()), se, se * t_quantile(len(loss)))

    @property
    def is_resolved(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.value) > self.half

    def __str__(self) -> str:
        return f"{self.value:+.2%} ± {self.se:.2%}"

    def document(self) -> dict[str, Any]:
        """Return the change as JSON values."""
        interval = [self.value - self.half, self.value + self.half]
        promised = self.is_resolved
        return {"change": self.value, "se": self.se, "interval": interval, "promised": promised}


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The change of loss in each range, and over all, weighted as the objective weighs them."""

    ranges: Mapping[str, Change]
    total: Change

    def document(self) -> dict[str, Any]:
        """Return the changes as JSON values."""
        ranges = {name: change.document() for name, change in self.ranges.items()}
        return {"total": self.total.document(), "ranges": ranges}


@dataclass(frozen=True, slots=True, eq=False)
class Coefficients:
    """The weights that follow from responses."""

    responses: Responses
    w: Array  # the weights [K], or [B K] per block or layer
    ridge: float  # rho
    predicted: Prediction  # the change of w, cross-fitted, with the bend
    fitted: float  # the total change on the samples that chose w, without the bend: too good
    bend: Change  # the part of the predicted change that the quadratic form does not see
    average: Prediction  # the change of the weights 1/K, on the same samples, with its bend
    against_average: Change  # change of w minus that of the average; below 0 is better
    inner_ridge: float | None = None  # least of RIDGES from rho on with all weights in INTERVAL

    @property
    def outside(self) -> list[tuple[str, int, float]]:
        """Block (or ""), expert and weight of the weights outside INTERVAL, farthest first."""
        rows, names = np.atleast_2d(self.w), self.responses.blocks or ("",)
        indices = np.argwhere(~_is_inside(rows)).tolist()
        entries = [(names[b], k, float(rows[b, k])) for b, k in indices]
        return sorted(entries, key=lambda entry: -abs(entry[2] - sum(INTERVAL) / 2))


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """dL(w) = b.w + w A w on each of M groups: b [M P], A [M P P]."""

    b: Array
    A: Array

    def solve(self, ridges: Sequence[float], *without: int) -> Array:
        """Return w* for n values of rho, fitted without some groups, [n P]; the shortest."""
        groups = len(self.b) - len(without)
        b = (self.b.sum(0) - sum(self.b[m] for m in without)) / groups
        A = (self.A.sum(0) - sum(self.A[m] for m in without)) / groups
        scale = np.sqrt(np.maximum(np.diagonal(A), 0))
        unit = np.where(scale > 0, scale, 1)
        e, V = np.linalg.eigh(A / np.outer(unit, unit))
        rho = np.asarray(ridges, dtype=np.float64)[:, None]
        stretched = np.maximum(e, 0) + rho
        kept = stretched > RESOLUTION * stretched[:, -1:]
        v = np.where(kept, V.T @ (-b / (2 * unit)), 0) / np.where(kept, stretched, 1) @ V.T
        return np.where(scale > 0, v / unit, 0)

    def changes(self, m: int, W: Array) -> Array:
        """Return the change on group m of weights [n P], [n]."""
        return np.asarray(W @ self.b[m] + np.einsum("np,np->n", W @ self.A[m], W))


def cross_fit(objective: Objective, ridges: Sequence[float]) -> Array:
    """Return weights for each group m that it did not choose, [1+M M P]; row 1+g is without g too.

    Those of m have the rho that serves the groups other than m best.
    """
    M, P = objective.b.shape
    pairs = {(m, g): objective.solve(ridges, m, g) for m in range(M) for g in range(m)}
    W = np.zeros((1 + M, M, P))
    for m in range(M):
        left = {g: pairs[max(m, g), min(m, g)] for g in range(M) if g != m}
        i = _best_ridge([objective.changes(g, rows) for g, rows in left.items()])
        W[0, m] = W[1 + m, m] = objective.solve(ridges[i : i + 1], m)[0]
        for g, rows in left.items():
            W[1 + g, m] = rows[i]
    return W


def solve_coefficients(
    responses: Responses,
    *,
    ridge: float | None = None,
    relative: bool = False,
    bend: Bend | None = None,
) -> Coefficients:
    """Solve for the weights, and predict what they change.

    Args:
        ridge: rho; None to choose it.
        relative: whether a range's loss counts relative to the base's. Else small t decide alone.
        bend: gives what the quadratic form does not see at weights [P], [R M]; None for a linear
            model.
    """
    loss, q = responses.loss, responses.shares / (responses.loss.mean(1) if relative else 1)
    b = np.einsum("r,rmp->mp", q, responses.slope)
    objective = Objective(b, np.einsum("r,rmpq->mpq", q, responses.products))
    ridges = RIDGES if ridge is None else (ridge,)
    cross = cross_fit(objective, ridges)
    groups = range(responses.M)
    rho = ridges[_best_ridge([objective.changes(m, objective.solve(ridges, m)) for m in groups])]
    w = objective.solve((rho,))[0]
    larger = [rho, *(ridge for ridge in RIDGES if ridge > rho)]
    inner = _is_inside(objective.solve(larger)).all(1)
    average = np.full(responses.P, 1 / responses.K)
    own_bend, average_bend = (
        np.zeros_like(loss) if bend is None else bend(x) for x in (w, average)
    )
    of_average = responses.change(average)
    rows = [q @ (responses.change(W) + own_bend - of_average - average_bend) for W in cross]
    return Coefficients(
        responses=responses,
        w=w.reshape(len(responses.blocks), responses.K) if responses.blocks else w,
        ridge=rho,
        predicted=_predict(responses, cross, q, own_bend),
        fitted=float((q @ responses.change(w)).sum() / (q @ loss).sum()),
        bend=Change.of(q @ own_bend, q @ loss),
        average=_predict(responses, [average] * len(cross), q, average_bend),
        against_average=Change.of(rows[0], q @ loss, np.stack(rows[1:])),
        inner_ridge=larger[int(inner.argmax())] if inner.any() else None,
    )


def predict(responses: Responses, w: Array) -> Prediction:
    """Predict what weights [P] change that these samples did not choose; ranges count by shares."""
    rows = [w] * (1 + responses.M)
    return _predict(responses, rows, responses.shares, np.zeros_like(responses.loss))


def _predict(responses: Responses, W: Iterable[Array], q: Array, bend: Array) -> Prediction:
    """Return the changes of the ranges and of all, counted by q [R], with the bend [R M]."""
    loss = responses.loss
    change, *without = (responses.change(row) + bend for row in W)
    rows = np.stack(without, 1)
    each = map(Change.of, change, loss, rows)
    ranges = dict(zip(map(str, responses.ranges), each, strict=True))
    return Prediction(ranges, Change.of(q @ change, q @ loss, np.einsum("r,rgm->gm", q, rows)))


def _best_ridge(changes: Sequence[Array]) -> int:
    """Return the index of the least mean change on groups left out, [n] each; the last."""
    mean = np.mean(changes, axis=0)
    return len(mean) - 1 - int(np.argmin(mean[::-1]))


def _is_inside(w: Array) -> Any:
    return (w >= INTERVAL[0]) & (w <= INTERVAL[1])
