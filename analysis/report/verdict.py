"""The verdict of a map: what was found and what to do, from one rule.

`analyze`, `ranges` and conflict.html all print it first. It depends on the map, the score and the least width of a range, not
on the cut that was asked for:

    unresolved   the blocks whose gradient stands out from noise cover less than half of [0, T): nothing can be said
    alike        no cut gains on held-out groups, or separate AdamW steps gain nothing by direction: train jointly
    conflict     they gain; the verdict names how many ranges, where, and how much

A cut that was asked for promises a gain only if the verdict is `conflict` and the interval of its own gain lies above 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from demerge.analysis.partitioning.bootstrap import Estimate, Evidence
from demerge.analysis.partitioning.cross_validation import Count, HeldOut, count, unsure
from demerge.analysis.partitioning.expected_gain import Interval, benefit
from demerge.analysis.partitioning.objective import GIVEN, cut
from demerge.analysis.partitioning.resolution import LEAST_KNOWN
from demerge.analysis.partitioning.sample_size import MOST, groups_needed
from demerge.analysis.similarity import error, without_pair
from demerge.timesteps import Partition

BEAT = 2.0
KINDS = ("unresolved", "alike", "conflict")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a map says.

    Attributes:
        kind: one of KINDS.
        partition: the ranges that the map supports; one range without a conflict.
        method: how they were found: `gradient`, or `uniform` if that is no worse.
        share: what a joint AdamW step misses of what separate ones gain, by direction.
        reason: why there is no promise; empty for a conflict.
        found: what was found, a sentence.
        advice: what to do, a sentence.
    """

    kind: str
    partition: Partition
    method: str
    share: Interval | None
    reason: str
    found: str
    advice: str

    @property
    def promised(self) -> bool:
        """Whether separate experts promise a gain."""
        return self.kind == "conflict"

    def __str__(self) -> str:
        return f"{self.found} {self.advice}"

    def document(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "kind": self.kind,
            "promised": self.promised,
            "found": self.found,
            "do": self.advice,
            "ranges": len(self.partition),
            "method": self.method,
            "cuts": self.partition.cuts,
            "share": None if self.share is None else self.share.document(),
        }


def verdict(
    evidence: Evidence, minimum: int | None = None, counted: Count | None = None
) -> Verdict:
    """Judge a map.

    Args:
        minimum: least width of a range in bins.
        counted: what `count` found by the method `gradient` with the same score and minimum, if known.
    """
    map = evidence.map
    whole = Partition.uniform(map.T, 1)
    if evidence.blocks.known < LEAST_KNOWN:
        return Verdict(
            "unresolved", whole, "uniform", None, unsure(evidence), *_unresolved(evidence)
        )
    counted = counted or count(map, score=evidence.score, minimum=minimum)
    if counted.chosen == 1:
        return _alike(whole, None, counted.reason)
    method, _ = advised(
        evidence,
        cut(map, counted.chosen, score=evidence.score, minimum=minimum),
        "gradient",
        minimum,
    )
    partition = cut(map, counted.chosen, method, score=evidence.score, minimum=minimum)
    promise = benefit(evidence, partition, method, minimum)
    if not promise.promised:
        return _alike(whole, promise.share, promise.sentence.removeprefix("no promise: "))
    found = f"The timesteps conflict: in {len(partition)} ranges cut at {listed(partition)} {promise.sentence}."
    advice = "Train an expert for each range, and the joint control."
    if converged(evidence):
        advice += " The joint gradient is near 0, as at a converged base: the share says nothing about how much there is to gain."
    return Verdict("conflict", partition, method, promise.share, "", found, advice)


def _alike(whole: Partition, share: Interval | None, reason: str) -> Verdict:
    found = f"No conflict that pays: {reason}."
    return Verdict(
        "alike",
        whole,
        "uniform",
        share,
        reason,
        found,
        "Train jointly; experts on ranges promise nothing here.",
    )


def _unresolved(evidence: Evidence) -> tuple[str, str]:
    """Say that noise hides the map, why, and what would do."""
    map = evidence.map
    found = f"Too little is resolved: {unsure(evidence)}."
    if converged(evidence):
        found += " The joint gradient is hidden by noise too, as at a base that has converged or was annealed."
    needed = groups_needed(map, evidence.found, LEAST_KNOWN)
    if needed >= MOST:
        return (
            found,
            "No affordable number of groups would resolve it: train jointly, or measure an earlier checkpoint.",
        )
    passes = f"{needed} groups of {map.origin.batch_size}, {needed * map.N:,} backward passes"
    return found, f"Measure about {passes}, for half of [0, T) to be resolved, or train jointly."


def converged(evidence: Evidence) -> bool:
    """Whether the joint gradient is not told from 0: every row of K then sums to 0, and some bins must oppose others."""
    w = evidence.map.widths
    joint = w @ evidence.found.K @ w
    return bool(joint <= error(without_pair(evidence.map) @ w @ w).half())


def advised(
    evidence: Evidence,
    best: Partition,
    judged: str,
    minimum: int | None,
    held_out: Mapping[str, Estimate] | None = None,
) -> tuple[str, str]:
    """Return `judged`, or `uniform` if the cut `best` that it found does not beat that on held-out groups, and why."""
    n = len(best)
    if n == 1:
        return "uniform", "one range leaves nothing to choose"
    if len(evidence.blocks) == n and judged != "given":
        return (
            "uniform",
            f"noise leaves {n} blocks of bins, so that there was one way to cut and nothing to choose",
        )
    gain = (held_out or gains_over(evidence, judged, best, minimum))["uniform"]
    if gain.above(BEAT):
        return (
            judged,
            f"on held-out groups the {judged} cut explains {gain} more of the conflict than uniform",
        )
    return (
        "uniform",
        f"on held-out groups the {judged} cut gains {gain} over uniform, less than {BEAT:g} SE",
    )


def gains_over(
    evidence: Evidence, judged: str, best: Partition, minimum: int | None
) -> dict[str, Estimate]:
    """Return how much more of J the judged cut explains than each of GIVEN, on groups that did not choose it.

    A given cut was chosen elsewhere, and is judged as it is.
    """
    held_out, n = HeldOut.of(evidence), len(best)
    gains = (
        held_out.given(best) if judged == "given" else held_out.gains([n], judged, minimum)[:, 0]
    )
    return {other: held_out.share(gains - held_out.gains([n], other)[:, 0]) for other in GIVEN}


def listed(partition: Partition) -> str:
    """Return the cuts of a partition in words: 125, 250 and 375."""
    places = [str(place) for place in partition.cuts]
    return " and ".join([", ".join(places[:-1]), places[-1]] if len(places) > 1 else places)
