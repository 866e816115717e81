"""Merge coefficients in closed form, from how a base's outputs answer to its experts (`demerge.analysis.experts.responses`).

    dL(w) = sum_R q_R dL_R(w) = b.w + w A w,     q_R = |R|/T, or |R|/T / L_R with `relative`
    w*    = -1/2 (A + rho diag A)^-1 b         by one eigendecomposition of A for all rho

w* is the least-squares solution of sum_p w_p u_p = -r over all timesteps: what two experts do alike is counted once, and
where they pull apart the ranges' losses decide. rho shrinks all weights towards 0, in units in which scaling a task vector
changes nothing; where none is given, it is the one of RIDGES whose weights, fitted without a group, serve that group best. An
expert that does not change the outputs has weight 0. Of weights per layer, P = K x layers is often more than the
samples tell apart; rho and the cross-fit are then what keeps the prediction honest.

The loss on the samples that chose w flatters it. So what is predicted is cross-fitted: the change on group m is that of
weights fitted, rho included, on the other groups. Its SE is the jackknife's over groups, SE^2 = (M-1)/M sum_g (theta_(g) -
mean)^2, where theta_(g) is cross-fitted anew without group g (for the rho found with it); without that its interval, by
quantiles of Student's t at M - 1 degrees of freedom, covers the truth in 82 % of noisy cases and not in 94 %. What the
quadratic form does not see at w* is measured (`responses.bend`) and added. Where the interval covers 0, nothing is promised.

A weight of 0 is the base, of 1 the expert. Outside INTERVAL = [-1, 2] a weight goes further from both than they are from each
other, where no response was measured; a lone one beside small ones comes of u_p that the samples hardly tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from demerge.analysis.experts.responses import Responses
from demerge.analysis.similarity import standard_error, t_quantile
from demerge.conflict import Array
from demerge.errors import UsageError

RIDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
INTERVAL = (-1.0, 2.0)
RESOLUTION = 1e-6  # of products of float32 outputs, at unit diagonal
LEVEL = 0.95
Bend = Callable[[Array], Array]


@dataclass(frozen=True, slots=True)
class Change:
    """A change of loss relative to a loss, its standard error, and the half width of its 95 % interval."""

    value: float
    se: float
    half: float

    @classmethod
    def of(cls, change: Array, loss: Array, without: Array | None = None) -> Change:
        """Return sum_m change_m / sum_m loss_m of M groups, with the jackknife's error.

        Args:
            change, loss: of each group, [M].
            without: [M M], in row g the changes as they are where group g takes no part; `change` again by default.
        """
        rows = np.broadcast_to(change, (len(change),) * 2) if without is None else without
        se = float(standard_error((rows.sum(1) - np.diagonal(rows)) / (loss.sum() - loss)))
        return cls(float(change.sum() / loss.sum()), se, se * t_quantile(len(loss), LEVEL))

    @property
    def sure(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.value) > self.half

    def __str__(self) -> str:
        return f"{self.value:+.2%} ± {self.se:.2%}"

    def document(self) -> dict[str, Any]:
        """Return the change as JSON values."""
        interval = [self.value - self.half, self.value + self.half]
        return {"change": self.value, "se": self.se, "interval": interval, "promised": self.sure}


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The change of loss in each range, and over all of them, weighted as the objective weighs them."""

    ranges: Mapping[str, Change]
    total: Change

    def document(self) -> dict[str, Any]:
        """Return the changes as JSON values."""
        return {
            "total": self.total.document(),
            "ranges": {name: found.document() for name, found in self.ranges.items()},
        }


@dataclass(frozen=True, slots=True, eq=False)
class Coefficients:
    """What the responses say about weights.

    Attributes:
        w: the weights [K], or [B K] per block or layer.
        ridge: rho.
        predicted: of w, cross-fitted, with the bend.
        fitted: the total change on the samples that chose w, by the quadratic form alone: too good.
        bend: the part of the predicted change that the quadratic form does not see.
        average: of the weights 1/K, on the same samples, with its bend.
        gained: how much more w changes the total than the average does; below 0 is better.
        calm: the least of RIDGES from rho on that has all weights in INTERVAL, None where none has.
    """

    responses: Responses
    w: Array
    ridge: float
    predicted: Prediction
    fitted: float
    bend: Change
    average: Prediction
    gained: Change
    calm: float | None = None

    @property
    def outside(self) -> list[tuple[str, int, float]]:
        """The weights outside INTERVAL: block or layer, empty for the model's; number of the expert; weight. Farthest first."""
        rows, names = np.atleast_2d(self.w), self.responses.blocks or ("",)
        places = np.argwhere((rows < INTERVAL[0]) | (rows > INTERVAL[1])).tolist()
        found = [(names[b], k, float(rows[b, k])) for b, k in places]
        return sorted(found, key=lambda entry: -abs(entry[2] - sum(INTERVAL) / 2))


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """dL(w) = b.w + w A w on each of M groups: b [M P], A [M P P]."""

    b: Array
    A: Array

    @property
    def M(self) -> int:
        """The number of groups."""
        return len(self.b)

    @property
    def P(self) -> int:
        """The number of weights."""
        return int(self.b.shape[1])

    def weights(self, ridges: Sequence[float], *out: int) -> Array:
        """Return w* for each of n values of rho, fitted without the groups `out`, [n P]; of least length of equals."""
        groups = self.M - len(out)
        b = (self.b.sum(0) - sum(self.b[m] for m in out)) / groups
        A = (self.A.sum(0) - sum(self.A[m] for m in out)) / groups
        scale = np.sqrt(np.maximum(np.diagonal(A), 0))
        unit = np.where(scale > 0, scale, 1)
        e, V = np.linalg.eigh(A / np.outer(unit, unit))
        rho = np.asarray(ridges, dtype=np.float64)[:, None]
        stretched = np.maximum(e, 0) + rho
        kept = stretched > RESOLUTION * stretched[:, -1:]
        v = np.where(kept, V.T @ (-b / (2 * unit)), 0) / np.where(kept, stretched, 1) @ V.T
        w: Array = np.where(scale > 0, v / unit, 0)
        return w

    def changes(self, m: int, W: Array) -> Array:
        """Return the change on group m of weights [n P], [n]."""
        changes: Array = W @ self.b[m] + np.einsum("np,np->n", W @ self.A[m], W)
        return changes


def settled(ridges: Sequence[float], changes: Sequence[Array]) -> int:
    """Return the place of the rho of the least mean change on groups left out, [n] each; the larger one of equals."""
    mean = np.mean(changes, axis=0)
    return min(reversed(range(len(ridges))), key=lambda i: float(mean[i]))


def coefficients(
    found: Responses,
    *,
    ridge: float | None = None,
    relative: bool = False,
    bend: Bend | None = None,
) -> Coefficients:
    """Solve for the weights, and predict what they change.

    Args:
        ridge: rho; None to choose it.
        relative: whether a range's loss counts relative to the base's, so that small t do not decide alone.
        bend: gives what the quadratic form does not see at weights [P], [R M]; None for a model that is linear.

    Raises:
        UsageError: where the ridge is negative or not finite.
    """
    if ridge is not None and not 0 <= ridge < float("inf"):
        raise UsageError(
            f"ridge {ridge} is not a shrinkage", fix="give a number >= 0, or leave it out"
        )
    q = found.shares / (found.loss.mean(1) if relative else 1)
    objective = Objective(
        np.einsum("r,rmp->mp", q, found.slope), np.einsum("r,rmpq->mpq", q, found.products)
    )
    ridges = RIDGES if ridge is None else (ridge,)
    cross = CrossFit.of(objective, ridges)
    rho = ridges[
        settled(
            ridges, [objective.changes(m, objective.weights(ridges, m)) for m in range(objective.M)]
        )
    ]
    w = objective.weights((rho,))[0]
    larger = [rho, *(ridge for ridge in RIDGES if ridge > rho)]
    calm = [
        bool(((x >= INTERVAL[0]) & (x <= INTERVAL[1])).all()) for x in objective.weights(larger)
    ]
    average = CrossFit.given(np.full(found.P, 1 / found.K), found.M)
    mine, theirs = (
        np.zeros_like(found.loss) if bend is None else bend(x) for x in (w, average.W[0])
    )
    rows = [
        q @ (found.change(one) + mine - found.change(other) - theirs)
        for one, other in zip(cross.rows, average.rows, strict=True)
    ]
    return Coefficients(
        found,
        w.reshape(len(found.blocks), found.K) if found.blocks else w,
        rho,
        _predicted(found, cross, q, mine),
        float((q @ found.change(w)).sum() / (q @ found.loss).sum()),
        Change.of(q @ mine, q @ found.loss),
        _predicted(found, average, q, theirs),
        Change.of(rows[0], q @ found.loss, np.stack(rows[1:])),
        next((ridge for ridge, inside in zip(larger, calm, strict=True) if inside), None),
    )


def predict(found: Responses, w: Array) -> Prediction:
    """Predict by the quadratic form what weights [P] change that these samples did not choose; ranges count by shares."""
    return _predicted(found, CrossFit.given(w, found.M), found.shares, np.zeros_like(found.loss))


@dataclass(frozen=True, slots=True, eq=False)
class CrossFit:
    """Weights for the samples of each group: W[m] is not fitted on group m, V[g, m] neither on m nor on g."""

    W: Array
    V: Array

    @classmethod
    def of(cls, objective: Objective, ridges: Sequence[float]) -> CrossFit:
        """Fit; of several rho, each W[m] has the one that serves the groups other than m best, and V[:, m] has it too."""
        groups = range(objective.M)
        twice = {(m, g): objective.weights(ridges, m, g) for m in groups for g in range(m)}
        W, V = (
            np.zeros((objective.M, objective.P)),
            np.zeros((objective.M, objective.M, objective.P)),
        )
        for m in groups:
            left = {g: twice[max(m, g), min(m, g)] for g in groups if g != m}
            i = settled(ridges, [objective.changes(g, each) for g, each in left.items()])
            W[m] = V[m, m] = objective.weights(ridges[i : i + 1], m)[0]
            for g, each in left.items():
                V[g, m] = each[i]
        return cls(W, V)

    @classmethod
    def given(cls, w: Array, M: int) -> CrossFit:
        """Return weights [P] that no sample chose."""
        return cls(np.broadcast_to(w, (M, len(w))), np.broadcast_to(w, (M, M, len(w))))

    @property
    def rows(self) -> list[Array]:
        """W, then V[g] for each g."""
        return [self.W, *self.V]


def _predicted(found: Responses, weights: CrossFit, q: Array, bent: Array) -> Prediction:
    """Return the changes of the ranges and of all of them, counted by q [R], with what bends [R M]."""
    change, *without = (found.change(W) + bent for W in weights.rows)
    rows = np.stack(without, 1)
    ranges = {
        str(span): Change.of(change[r], found.loss[r], rows[r])
        for r, span in enumerate(found.ranges)
    }
    return Prediction(
        ranges, Change.of(q @ change, q @ found.loss, np.einsum("r,rgm->gm", q, rows))
    )
