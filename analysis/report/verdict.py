"""The verdict of a map: what was found and what to do, from one rule.

`analyze`, `ranges` and conflict.html all print it first. It depends on the map, the score and the
least width of a range:

    unresolved   gradients stand out from noise on less than half of [0, T): nothing can be said
    alike        no cut gains on held-out groups, or separate AdamW steps gain nothing by direction
    conflict     they gain; the verdict names how many ranges, where, and how much

A partition that a method found promises a gain only if the verdict is `conflict` and the interval
of its own gain lies above 0.

Of ranges of your own the verdict answers one question: several experts, or one? It is `conflict` if
the interval of their gain lies above 0, and `alike` if not: one model will do. No other cut is
tried, so the interval alone decides; of equal gradients it decides wrongly in at most 5 % of maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from demerge.analysis.partitioning.cross_validation import cross_validation, gains_over_fixed
from demerge.analysis.partitioning.expected_gain import Interval, expected_gain
from demerge.analysis.partitioning.map_reading import Reading, once
from demerge.analysis.partitioning.resolution import LEAST_KNOWN, MOST_GROUPS, sample_size
from demerge.timesteps import Partition

BEAT = 2.0
GIVEN = "given"  # the method of ranges of your own
WIDE = 0.1  # an interval that reaches above it leaves a gain open
HEADLINES = {
    "unresolved": "Too little is resolved: measure more, or train jointly",
    "alike": "No conflict that pays: train jointly",
    "conflict": "The timesteps conflict: train an expert for each range",
}
ONE, UNKNOWN = "One model will do", "It is not known whether one model will do"
NUMERALS = {2: "Two", 3: "Three", 4: "Four"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a map says."""

    kind: str  # one of HEADLINES
    partition: Partition  # the ranges that the map supports; one range without a conflict
    method: str  # how they were found: `gradient`, `uniform` if that is no worse, or `given`
    share: Interval | None  # what a joint AdamW step misses, by direction
    reason: str  # why there is no promise; empty for a conflict
    finding: str  # what was found, a sentence
    advice: str  # what to do, a sentence

    @property
    def headline(self) -> str:
        """What was found, in a few words."""
        return self.finding.partition(":")[0] if self.method == GIVEN else HEADLINES[self.kind]

    @property
    def is_promised(self) -> bool:
        """Whether separate experts promise a gain."""
        return self.kind == "conflict"

    def __str__(self) -> str:
        return f"{self.finding} {self.advice}"

    def document(self) -> dict[str, Any]:
        """Return JSON values."""
        text = {"kind": self.kind, "promised": self.is_promised, "found": self.finding}
        ranges = {"ranges": len(self.partition), "method": self.method, "cuts": self.partition.cuts}
        share = None if self.share is None else self.share.document()
        return {**text, "do": self.advice, **ranges, "share": share}


@once
def verdict(reading: Reading, given: Partition | None = None) -> Verdict:
    """Judge a map, or the ranges `given` by it."""
    if not reading.blocks.is_enough:
        return _unresolved(reading, given)
    if given is not None:
        return _judge_given(reading, given)
    count = cross_validation(reading)
    if count.chosen == 1:
        return _alike(reading, None, count.reason)
    best = reading.partition(count.chosen)
    method, _ = advised_method(reading, best, "gradient")
    partition = best if method == "gradient" else reading.partition(count.chosen, method)
    promise = expected_gain(reading, partition, method)
    if not promise.is_promised:
        return _alike(reading, promise.share, promise.obstacle)
    where = f"in {len(partition)} ranges cut at {list_cuts(partition)}"
    finding = f"The timesteps conflict: {where} {promise.sentence}."
    return _conflict(reading, partition, method, promise.share, finding)


def _judge_given(reading: Reading, given: Partition) -> Verdict:
    """Say whether experts of ranges of your own are worth it, or one model will do."""
    promise = expected_gain(reading, given)
    if promise.is_promised:
        n = len(given)
        finding = f"{NUMERALS.get(n, n)} experts are worth it: {promise.sentence}."
        return _conflict(reading, given, GIVEN, promise.share, finding)
    kind, answer, reason = "alike", ONE, promise.obstacle
    advice = "Train jointly, or merge the experts into one model."
    if len(given) > 1 and not promise.share.is_known:
        kind, answer, advice = "unresolved", UNKNOWN, "Measure more --groups, or train jointly."
    elif promise.share.high > WIDE:
        advice += f" The map leaves a gain of up to {promise.share.high:.0%} open;"
        advice += " more --groups narrow the interval."
    whole, finding = Partition.uniform(reading.map.T, 1), f"{answer}: {reason}."
    return Verdict(kind, whole, GIVEN, promise.share, reason, finding, advice)


def _conflict(
    reading: Reading, partition: Partition, method: str, share: Interval, finding: str
) -> Verdict:
    advice = "Train an expert for each range, and the joint control."
    if reading.is_converged:
        advice += " The joint gradient is near 0, as at a converged base:"
        advice += " the share says nothing about how much there is to gain."
    return Verdict("conflict", partition, method, share, "", finding, advice)


def _alike(reading: Reading, share: Interval | None, reason: str) -> Verdict:
    finding = f"No conflict that pays: {reason}."
    advice = "Train jointly; experts on ranges promise nothing here."
    whole = Partition.uniform(reading.map.T, 1)
    return Verdict("alike", whole, "uniform", share, reason, finding, advice)


def _unresolved(reading: Reading, given: Partition | None) -> Verdict:
    """Say that noise hides the map, why, and what would do."""
    map, reason = reading.map, reading.doubt
    method, answer = ("uniform", "Too little is resolved") if given is None else (GIVEN, UNKNOWN)
    finding = f"{answer}: {reason}."
    if reading.is_converged:
        finding += " Noise hides the joint gradient too: the base has converged or was annealed."
    groups = sample_size(map, reading.bins, LEAST_KNOWN)
    if groups >= MOST_GROUPS:
        fix = "train jointly, or measure an earlier checkpoint"
        advice = f"No affordable number of groups would resolve it: {fix}."
    else:
        passes = f"{groups} groups of {map.origin.batch_size}, {groups * map.N:,} backward passes"
        advice = f"Measure about {passes}, for half of [0, T) to be resolved, or train jointly."
    whole = Partition.uniform(map.T, 1)
    return Verdict("unresolved", whole, method, None, reason, finding, advice)


def advised_method(reading: Reading, best: Partition, method: str) -> tuple[str, str]:
    """Return the method that found `best`, or `uniform` if that is no worse, and why.

    `best` must explain more than uniform on held-out groups, by 2 SE.
    """
    n = len(best)
    if n == 1:
        return "uniform", "one range leaves nothing to choose"
    if len(reading.blocks) == n and method != "given":
        one_way = "so that there was one way to cut and nothing to choose"
        return "uniform", f"noise leaves {n} blocks of bins, {one_way}"
    gain = gains_over_fixed(reading, best, method)["uniform"]
    cut = f"on held-out groups the {method} cut"
    if gain.above(BEAT):
        return method, f"{cut} explains {gain} more of the conflict than uniform"
    return "uniform", f"{cut} gains {gain} over uniform, less than {BEAT:g} SE"


def list_cuts(partition: Partition) -> str:
    """Return the cuts of a partition in words: 125, 250 and 375."""
    *first, last = [str(cut) for cut in partition.cuts] or [""]
    return f"{', '.join(first)} and {last}" if first else last
