"""What decoupling promises before anything is trained, to first order, with an interval.

`finetune` takes AdamW steps. Their length is fixed: the gradient over its own root mean square. A step of length 1 along the
mean gradient of a range R lowers the loss there by |gbar_R|, the same step along the joint mean gradient by
<gbar_R, gbar>/|gbar|. So a joint step misses of what separate ones gain

    missed_R = 1 - cos(gbar_R, gbar)                in the range R
    J        = sum_R w_R |gbar_R| - |gbar|          over all ranges, for each unit of the step's length
    share    = J / sum_R w_R |gbar_R|               in [0, 1]; 0 if and only if all gbar_R are parallel

Direction alone counts: gradients that are parallel and of unequal length are not in conflict. A promise is made on this share.
Two more numbers say what else happens. Both contain the part of unequal lengths, so no promise rests on them:

    batch    the root mean square holds the noise of a batch of B samples, rms_R^2 = |gbar_R|^2 + tr Sigma_R / B. The gain of
             a step is |gbar_R|^2 / rms_R, and share_B = 1 - (|gbar|^2 / rms) / (sum_R w_R |gbar_R|^2 / rms_R). It is `share`
             for large B. Sigma of a range holds what differs between its bins, so a joint step has more noise.
    sgd      1 - |gbar|^2 / sum_R w_R |gbar_R|^2, plain gradient steps. With L = sum_R w_R |gbar_R| it is a sum of two parts,
             direction (L^2 - |gbar|^2) and length (sum_R w_R |gbar_R|^2 - L^2), each over sum_R w_R |gbar_R|^2.

All are functions of K, the cross-group U-statistic. It is unbiased for squares; a plain norm of a noisy mean is too long.
Intervals are those of similarity.py at 95 %. For a cut that was found on the map, J and share are means over halves (A, B) of
the groups, of the cut found on A and judged on B, with the jackknife's error. All else is of the cut that was taken, on all
groups, and flatters it a little.

Held against training: digits UNet after 400 steps of 64 at 1e-3 (cosine), a map of 10 bins and 12 groups of 128, four ranges
cut at 100, 200 and 500, experts on their ranges alone (p = 0, lambda = 0), losses on test images, two seeds. A joint AdamW step
missed

    batches of 128, lr 5e-5        89 and 84 % after 20 steps, 82 and 83 % after 40        79 % predicted for 128
    batches of 1,024, lr 1e-4      68 and 82 % after 15 steps                              66 % predicted for 1,024

where `share` is 50 % and `sgd` 86 %. So `share` is the careful number, that of large batches. At batches as small as those of
`finetune` a joint AdamW step misses nearly as much as a plain one does. In its first 5 to 10 steps Adam's own start rules.

A promise is one of direction: at a converged base the joint step gains nothing, and the share is 1 by calculus; how much
there is to gain, and how far, only training tells. Experts of `finetune` see 30 % of other timesteps and stay near the base
by default; both shrink their lead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from demerge.analysis.partitioning.bootstrap import Evidence, short
from demerge.analysis.partitioning.cross_validation import HeldOut
from demerge.analysis.partitioning.objective import FOUND, Objective, cover
from demerge.analysis.partitioning.search import total
from demerge.analysis.similarity import error, standard_error, t_quantile, without_pair
from demerge.conflict import Array, ConflictMap
from demerge.timesteps import Partition, TimestepRange

BATCH = 64  # samples of a step, as `finetune` takes them by default


@dataclass(frozen=True, slots=True)
class Interval:
    """A number, its standard error, and the ends of its 95 % interval; NaN if noise hides it."""

    value: float
    se: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, without: Array) -> Interval:
        """Make one from the value of all groups and those without each pair of them, [P]."""
        if not (math.isfinite(value) and np.isfinite(without).all()):
            return cls(math.nan, math.nan, math.nan, math.nan)
        found = error(without)
        half = float(found.half())
        return cls(value, float(found.se), value - half, value + half)

    @classmethod
    def jackknife(cls, value: float, left_out: Array) -> Interval:
        """Make one from the value of all groups and those without each group, [M]."""
        if not (math.isfinite(value) and np.isfinite(left_out).all()):
            return cls(math.nan, math.nan, math.nan, math.nan)
        se = float(standard_error(left_out))
        half = t_quantile(len(left_out)) * se
        return cls(value, se, value - half, value + half)

    @property
    def known(self) -> bool:
        """Whether noise leaves a number."""
        return math.isfinite(self.value)

    def __str__(self) -> str:
        return f"{self.value:.0%} ({self.low:.0%} to {self.high:.0%})" if self.known else "unknown"

    def document(self) -> dict[str, float | None]:
        """Return JSON values, None for what is not known."""
        return {name: short(getattr(self, name)) for name in ("value", "se", "low", "high")}


@dataclass(frozen=True, slots=True)
class RangeBenefit:
    """What a joint step misses in one range, and the length |gbar_R| relative to sum_R w_R |gbar_R|."""

    span: TimestepRange
    missed: Interval
    length: Interval


@dataclass(frozen=True, slots=True)
class Benefit:
    """What a cut promises.

    Attributes:
        ranges: of the cut that was taken.
        gain, share: J and its share, for steps of fixed length: direction alone.
        batch: the share of AdamW steps of BATCH samples, with their noise.
        sgd: the share of plain gradient steps.
        sgd_length: its part that comes from unequal lengths.
        held_out: whether J and share are of cuts judged on groups that did not choose them.
        doubt: why the map allows no promise, whatever the interval says; empty if it does.
    """

    ranges: tuple[RangeBenefit, ...]
    gain: Interval
    share: Interval
    batch: Interval
    sgd: Interval
    sgd_length: Interval
    held_out: bool
    doubt: str = ""

    @property
    def promised(self) -> bool:
        """Whether the map allows a promise and the interval of J lies above 0."""
        return not self.doubt and len(self.ranges) > 1 and self.gain.low > 0

    @property
    def sentence(self) -> str:
        """What to expect, in words."""
        if len(self.ranges) == 1:
            return "no promise: one range leaves nothing to decouple"
        if self.doubt:
            return f"no promise: {self.doubt}"
        if not self.share.known:
            return "no promise: noise hides what steps of the ranges would gain"
        if self.promised:
            noisy = (
                f"; with the noise of batches of {BATCH}, {self.batch.value:.0%}"
                if self.batch.known
                else ""
            )
            return f"a joint AdamW step misses {self.share} of what separate ones gain, by direction alone{noisy}"
        where = "covers" if self.gain.high >= 0 else "lies below"
        return f"no promise: a joint AdamW step misses {self.share} of what separate ones gain, and the interval {where} 0"

    @property
    def plain(self) -> str:
        """What plain gradient steps would miss, by direction and by length, in words."""
        if not self.sgd.known:
            return "unknown: noise hides it"
        direction = self.sgd.value - self.sgd_length.value
        return f"{self.sgd} missed: {direction:.0%} by direction, {self.sgd_length.value:.0%} by unequal lengths"

    def document(self) -> dict[str, Any]:
        """Return JSON values."""
        rows = [
            {
                "range": [each.span.start, each.span.stop],
                "missed": each.missed.document(),
                "length": each.length.document(),
            }
            for each in self.ranges
        ]
        return {
            "promised": self.promised,
            "sentence": self.sentence,
            "held_out": self.held_out,
            "gain": self.gain.document(),
            "share": self.share.document(),
            "batch": {"size": BATCH, **self.batch.document()},
            "sgd": {**self.sgd.document(), "length": short(self.sgd_length.value)},
            "plain": self.plain,
            "ranges": rows,
        }


def benefit(
    evidence: Evidence,
    partition: Partition,
    method: str = "given",
    minimum: int | None = None,
    doubt: str = "",
) -> Benefit:
    """Predict what experts of the ranges gain over a joint model.

    Args:
        method: how the partition was found; J is cross-fitted for methods that look at the map.
        minimum: least width of a range in bins that the method was given.
        doubt: why the map allows no promise.
    """
    shares = cover(evidence.map, partition)
    at, without = (
        _Steps.of(evidence.map, K, shares) for K in (evidence.found.K, without_pair(evidence.map))
    )

    def interval(name: str) -> Interval:
        return Interval.of(float(getattr(at, name)), getattr(without, name))

    rows = tuple(
        RangeBenefit(span, Interval.of(float(m), m_), Interval.of(float(n), n_))
        for span, m, m_, n, n_ in zip(
            partition, at.missed, without.missed.T, at.relative, without.relative.T, strict=True
        )
    )
    held_out = method in FOUND and len(partition) > 1
    if held_out:
        explained, gains = _cross_fitted(evidence, len(partition), method, minimum)
        ratio = np.divide(gains, explained, out=np.full_like(gains, np.nan), where=explained > 0)
        gain, share = (Interval.jackknife(float(each[0]), each[1:]) for each in (gains, ratio))
    else:
        gain, share = interval("gain"), interval("share")
    return Benefit(
        rows,
        gain,
        share,
        interval("batch"),
        interval("sgd"),
        interval("sgd_length"),
        held_out,
        doubt,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """First-order gains of steps, for K [* N N]; NaN if the square of a length is not above 0.

    Attributes:
        weights: w_R, [R].
        own, joint: |gbar_R|^2 [* R] and |gbar|^2 [*].
        along: <gbar_R, gbar>, [* R].
        noise, joint_noise: tr Sigma of one sample, of each range [* R] and of all [*].
    """

    weights: Array
    own: Array
    joint: Array
    along: Array
    noise: Array
    joint_noise: Array

    @classmethod
    def of(cls, map: ConflictMap, K: Array, shares: Array) -> _Steps:
        """Take them from K, for ranges that cover `shares` of the bins, [R N]."""
        u = shares * map.widths
        w = u.sum(1)
        p = u / w[:, None]
        products = np.einsum("rn,...nk,sk->...rs", p, K, p, optimize=True)
        own, along = np.diagonal(products, axis1=-2, axis2=-1), products @ w
        own, joint = (np.where(square > 0, square, np.nan) for square in (own, along @ w))
        signal = np.diagonal(K, axis1=-2, axis2=-1)
        squares = np.einsum("imim->i", map.gram) / map.M  # |mu_i|^2 + tr Sigma_i / B
        one = signal + map.origin.batch_size * (squares - signal)  # E |s|^2 of one sample of a bin
        if map.origin.noise != "off":  # antithetic draws have less noise than those of training
            one = np.full_like(one, np.nan)
        return cls(w, own, joint, along, one @ p.T - own, one @ map.widths - joint)

    @property
    def _lengths(self) -> tuple[Array, Array, Array]:
        length = np.sqrt(self.own)
        return length, length @ self.weights, np.sqrt(self.joint)

    @property
    def relative(self) -> Array:
        length, mean, _ = self._lengths
        relative: Array = length / mean[..., None]
        return relative

    @property
    def missed(self) -> Array:
        length, _, joint = self._lengths
        missed: Array = 1 - self.along / (length * joint[..., None])
        return missed

    @property
    def gain(self) -> Array:
        _, mean, joint = self._lengths
        gain: Array = mean - joint
        return gain

    @property
    def share(self) -> Array:
        _, mean, joint = self._lengths
        share: Array = 1 - joint / mean
        return share

    @property
    def batch(self) -> Array:
        own = self.own / np.sqrt(np.clip(self.own + self.noise / BATCH, self.own, None))
        joint = self.joint / np.sqrt(
            np.clip(self.joint + self.joint_noise / BATCH, self.joint, None)
        )
        share: Array = 1 - joint / (own @ self.weights)
        return share

    @property
    def sgd(self) -> Array:
        share: Array = 1 - self.joint / (self.own @ self.weights)
        return share

    @property
    def sgd_length(self) -> Array:
        _, mean, _ = self._lengths
        part: Array = 1 - mean**2 / (self.own @ self.weights)
        return part


def _cross_fitted(
    evidence: Evidence, n: int, method: str, minimum: int | None
) -> tuple[Array, Array]:
    """Return sum_R w_R |gbar_R| and J of cuts found on half of the groups, judged on the other, [1+M] each."""
    step = Objective.of(evidence.map, "step", evidence.found)

    def judged(a: Array, b: Array) -> tuple[float, float]:
        table = step.table(b)
        (edges,) = evidence.edges(a, [n], method, minimum)
        explained = total(table, edges)
        return explained, explained - float(table[0, -1])

    splits = HeldOut.of(evidence).splits
    means = [np.mean([judged(a, b) for a, b in zip(A, B, strict=True)], axis=0) for A, B in splits]
    explained, gain = np.transpose(means)
    return explained, gain
