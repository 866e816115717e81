"""What decoupling promises before anything is trained, to first order, with an interval.

`finetune` takes AdamW steps. Their length is fixed: the gradient over its own root mean square. A
step of length 1 along the mean gradient of a range R lowers the loss there by |gbar_R|, the same
step along the joint mean gradient by <gbar_R, gbar>/|gbar|. So a joint step misses of what separate
ones gain

    missed_R = 1 - cos(gbar_R, gbar)                in the range R
    J        = sum_R w_R |gbar_R| - |gbar|          over all ranges, per unit of the step's length
    share    = J / sum_R w_R |gbar_R|               in [0, 1]; 0 if and only if all are parallel

Direction alone counts: gradients that are parallel and of unequal length are not in conflict. A
promise is made on this share. Two more numbers say what else happens. Both contain the part of
unequal lengths, so no promise rests on them:

    batch    the root mean square holds the noise of a batch of B samples,
             rms_R^2 = |gbar_R|^2 + tr Sigma_R / B. The gain of a step is |gbar_R|^2 / rms_R, and
             share_B = 1 - (|gbar|^2 / rms) / (sum_R w_R |gbar_R|^2 / rms_R). It is `share` for
             large B. Sigma of a range holds what differs between its bins, so a joint step has
             more noise.
    sgd      1 - |gbar|^2 / sum_R w_R |gbar_R|^2, plain gradient steps. With
             L = sum_R w_R |gbar_R| it is a sum of two parts, direction (L^2 - |gbar|^2) and length
             (sum_R w_R |gbar_R|^2 - L^2), each over sum_R w_R |gbar_R|^2.

All are functions of K, the cross-group U-statistic. It is unbiased for squares; a plain norm of a
noisy mean is too long. Intervals are those of similarity.py at 95 %. For a partition that was found
on the map, J and share are means over halves (A, B) of the groups, of the partition found on A and
judged on B, with the jackknife's error. All else is of the partition that was taken, on all groups,
and flatters it a little.

`share` is the careful number, that of large batches; docs/studies.md compares both with training.
At a converged base the joint step gains nothing, and the share is 1 by calculus. How much there is
to gain, and how far, only training tells. Experts of `finetune` see 30 % of other timesteps and
stay near the base by default; both shrink their lead.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from demerge.analysis.partitioning.cross_validation import halved, held_out_edges
from demerge.analysis.partitioning.map_reading import Reading, once
from demerge.analysis.partitioning.objective import ADAPTIVE, Objective, cover
from demerge.analysis.partitioning.search import total
from demerge.analysis.similarity import estimate_error, json_number, standard_error, t_quantile
from demerge.conflict import Array, ConflictMap
from demerge.timesteps import Partition, TimestepRange

BATCH = 64  # samples of a step, as `finetune` takes them by default
NARROW = 0.02  # an interval that is shown with a decimal


@dataclass(frozen=True, slots=True)
class Interval:
    """A number, its standard error, and the ends of its 95 % interval; NaN if noise hides it."""

    value: float
    se: float
    low: float
    high: float

    @classmethod
    def of(cls, value: Array, replicates: Array, *, by_group: bool = False) -> Interval:
        """Make one from the value of all groups and those without each pair of them (or group)."""
        if not (np.isfinite(value) and np.isfinite(replicates).all()):
            return cls(math.nan, math.nan, math.nan, math.nan)
        if by_group:
            se = float(standard_error(replicates))
            half = t_quantile(len(replicates)) * se
        else:
            error = estimate_error(replicates)
            se, half = float(error.se), float(error.half())
        return cls(float(value), se, float(value) - half, float(value) + half)

    @property
    def is_known(self) -> bool:
        """Whether noise leaves a number."""
        return math.isfinite(self.value)

    def __str__(self) -> str:
        if not self.is_known:
            return "unknown"
        form = "z.1%" if self.high - self.low < NARROW else "z.0%"
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"

    def document(self) -> dict[str, float | None]:
        """Return JSON values, None for what is not known."""
        return {name: json_number(number) for name, number in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class RangeGain:
    """What a joint step misses in one range, and |gbar_R| relative to sum_R w_R |gbar_R|."""

    span: TimestepRange
    missed: Interval
    length: Interval

    def document(self) -> dict[str, Any]:
        """Return JSON values."""
        numbers = {"missed": self.missed.document(), "length": self.length.document()}
        return {"range": [self.span.start, self.span.stop], **numbers}


@dataclass(frozen=True, slots=True)
class ExpectedGain:
    """What a partition promises."""

    ranges: tuple[RangeGain, ...]  # of the partition that was taken
    gain: Interval  # J for steps of fixed length: direction alone
    share: Interval  # its share
    batch: Interval  # the share of AdamW steps of BATCH samples, with their noise
    sgd: Interval  # the share of plain gradient steps
    sgd_length: Interval  # its part that comes from unequal lengths
    is_held_out: bool  # J and share are judged on groups that did not choose the ranges
    doubt: str = ""  # why the map allows no promise, whatever the interval says; empty if it does

    @property
    def is_promised(self) -> bool:
        """Whether the map allows a promise and the interval of J lies above 0."""
        return not self.doubt and len(self.ranges) > 1 and self.gain.low > 0

    @property
    def obstacle(self) -> str:
        """Why there is no promise, in words; empty for a promise."""
        if self.is_promised:
            return ""
        if len(self.ranges) == 1:
            return "one range leaves nothing to decouple"
        if self.doubt:
            return self.doubt
        if not self.share.is_known:
            return "noise hides what steps of the ranges would gain"
        where = "covers" if self.gain.high >= 0 else "lies below"
        return f"{self._missed}, and the interval {where} 0"

    @property
    def sentence(self) -> str:
        """What to expect, in words."""
        if not self.is_promised:
            return f"no gain is predicted: {self.obstacle}"
        noisy = f"; with the noise of batches of {BATCH}, {self.batch.value:.0%}"
        return f"{self._missed}, by direction alone{noisy if self.batch.is_known else ''}"

    @property
    def _missed(self) -> str:
        return f"a joint AdamW step misses {self.share} of what separate ones gain"

    @property
    def plain(self) -> str:
        """What plain gradient steps would miss, by direction and by length, in words."""
        if not self.sgd.is_known:
            return "unknown: noise hides it"
        direction = f"{self.sgd.value - self.sgd_length.value:.0%} by direction"
        return f"{self.sgd} missed: {direction}, {self.sgd_length.value:.0%} by unequal lengths"

    def document(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "promised": self.is_promised,
            "sentence": self.sentence,
            "held_out": self.is_held_out,
            "gain": self.gain.document(),
            "share": self.share.document(),
            "batch": {"size": BATCH, **self.batch.document()},
            "sgd": {**self.sgd.document(), "length": json_number(self.sgd_length.value)},
            "plain": self.plain,
            "ranges": [each.document() for each in self.ranges],
        }


@once
def expected_gain(
    reading: Reading, partition: Partition, method: str = "given", doubt: str = ""
) -> ExpectedGain:
    """Predict what experts of the ranges gain over a joint model.

    J is cross-fitted if the method that found the partition looks at the map.
    """
    shares = cover(reading.map, partition)
    at = _Steps.of(reading.map, reading.bins.K, shares)
    without = _Steps.of(reading.map, reading.pairs, shares)

    def interval(name: str, *k: int) -> Interval:
        return Interval.of(getattr(at, name)[k], getattr(without, name)[:, *k])

    is_held_out = method in ADAPTIVE and len(partition) > 1
    if is_held_out:
        explained, gains = _cross_fitted(reading, len(partition), method)
        ratio = np.divide(gains, explained, out=np.full_like(gains, np.nan), where=explained > 0)
        gain = Interval.of(gains[0], gains[1:], by_group=True)
        share = Interval.of(ratio[0], ratio[1:], by_group=True)
    else:
        gain, share = interval("gain"), interval("share")
    ranges = tuple(
        RangeGain(span, interval("missed", k), interval("relative", k))
        for k, span in enumerate(partition)
    )
    others = interval("batch"), interval("sgd"), interval("sgd_length")
    return ExpectedGain(ranges, gain, share, *others, is_held_out, doubt)


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """First-order gains of steps [*] and of ranges [* R], NaN if |gbar_R|^2 is not above 0."""

    missed: Array
    relative: Array
    gain: Array
    share: Array
    batch: Array
    sgd: Array
    sgd_length: Array

    @classmethod
    def of(cls, map: ConflictMap, K: Array, shares: Array) -> _Steps:
        """Compute them from K [* N N], for ranges that cover `shares` of the bins, [R N]."""
        u = shares * map.widths
        w = u.sum(1)
        p = u / w[:, None]
        products = p @ K @ p.T  # <gbar_R, gbar_S>
        along = products @ w  # <gbar_R, gbar>
        own, joint = np.diagonal(products, axis1=-2, axis2=-1), along @ w
        own, joint = (np.where(squares > 0, squares, np.nan) for squares in (own, joint))
        length, joint_length = np.sqrt(own), np.sqrt(joint)
        mean, energy = length @ w, own @ w
        noise, joint_noise = _noise(map, K, p, own, joint)
        steps = own / np.sqrt(np.clip(own + noise / BATCH, own, None))
        joint_steps = joint / np.sqrt(np.clip(joint + joint_noise / BATCH, joint, None))
        return cls(
            missed=1 - along / (length * joint_length[..., None]),
            relative=length / mean[..., None],
            gain=mean - joint_length,
            share=1 - joint_length / mean,
            batch=1 - joint_steps / (steps @ w),
            sgd=1 - joint / energy,
            sgd_length=1 - mean**2 / energy,
        )


def _noise(map: ConflictMap, K: Array, p: Array, own: Array, joint: Array) -> tuple[Array, Array]:
    """Return tr Sigma of one sample, of each range [* R] and of all [*]."""
    signal = np.diagonal(K, axis1=-2, axis2=-1)
    squares = np.einsum("imim->i", map.gram) / map.M  # |mu_i|^2 + tr Sigma_i / B
    one = signal + map.origin.batch_size * (squares - signal)  # E |s|^2 of one sample of a bin
    if map.origin.noise != "off":  # antithetic draws have less noise than those of training
        one = np.full_like(one, np.nan)
    return one @ p.T - own, one @ map.widths - joint


def _cross_fitted(reading: Reading, n: int, method: str) -> tuple[Array, Array]:
    """Return sum_R w_R |gbar_R| and J of partitions found on A and judged on B, [1+M] each."""
    step, rows = Objective.of(reading.map, "step", reading.bins), []
    chosen = held_out_edges(reading, (n,), method)
    for (_, K_B), (edges,) in zip(halved(reading), chosen, strict=True):
        table = step.table(K_B)
        explained = total(table, edges)
        rows.append((explained.mean(), (explained - table[:, 0, -1]).mean()))
    explained, gain = np.transpose(rows)
    return explained, gain
