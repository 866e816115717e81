"""The conclusion of an analysis: what a map says of a partition, as values, JSON and lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any

import numpy as np

from demerge.analysis.partitioning.bootstrap import CutSupport, drawn_cuts, support
from demerge.analysis.partitioning.cross_validation import (
    RangeCount,
    cross_validation,
    gains_over_fixed,
)
from demerge.analysis.partitioning.expected_gain import ExpectedGain, expected_gain
from demerge.analysis.partitioning.map_reading import Reading
from demerge.analysis.partitioning.objective import ADAPTIVE, METHODS, check_choice
from demerge.analysis.partitioning.resolution import MOST_GROUPS, sample_size
from demerge.analysis.report.verdict import GIVEN, Verdict, advised_method, verdict
from demerge.analysis.similarity import Estimate, estimate_error, estimate_table, json_number
from demerge.errors import NumericalError
from demerge.timesteps import Partition, TimestepRange

ADVISED = "advised"


@dataclass(frozen=True, slots=True)
class Explained:
    """A partition and its share of the conflict; the share is None if it is not known."""

    partition: Partition
    share: Estimate | None

    def document(self) -> dict[str, Any]:
        """Return JSON values."""
        share = self.share.document("share") if self.share else {"share": None, "se": None}
        return {"cuts": self.partition.cuts, **share}

    def __str__(self) -> str:
        return f"{self.partition.cuts} explains {_pair(self.share)}"


@dataclass(frozen=True, slots=True)
class RowSums:
    """Whether the base has converged: then every row sum_j w_j K_ij = <mu_i, gbar> is 0."""

    ratio: Estimate  # |gbar|^2 / sum_i w_i |mu_i|^2, 0 if converged, 1 if all bins pull alike
    rows: int  # how many of the N rows differ from 0 by more than a 95 % interval


@dataclass(frozen=True, slots=True, eq=False)
class ConflictSummary:
    """What a map says of the partition that was asked for, and of others.

    Attributes:
        reading: the map it is about.
        verdict: of the map alone: what was found and what to do.
        cuts: by method, None if noise leaves no such partition.
        judged: the method that `support`, `held_out` and `advice` are about: what was asked for, or
            `gradient` if that does not look at the map.
        support: of each of its cuts.
        held_out: its gain over the fixed methods on held-out groups.
        advice, reason: it or `uniform`, and why.
        taken: what was asked for, or `uniform` if noise leaves no such partition.
        expected_gain: what training experts of the ranges that were taken promises.
        groups_needed: groups that would resolve all bins.
        supported: how many ranges cross-validation supports, if that was asked for.
        is_automatic: whether the number of ranges was found by it.
    """

    reading: Reading
    verdict: Verdict
    ranges: int
    cuts: Mapping[str, Explained | None]
    judged: str
    support: tuple[CutSupport, ...]
    held_out: Mapping[str, Estimate]
    row_sums: RowSums
    advice: str
    reason: str
    taken: str
    expected_gain: ExpectedGain
    groups_needed: int
    supported: RangeCount | None = None
    is_automatic: bool = False

    @property
    def explained(self) -> Explained:
        """The ranges that were taken, and the share of the conflict that they explain."""
        explained = self.cuts[self.taken]
        assert explained is not None  # `summarize` takes no other
        return explained

    @property
    def partition(self) -> Partition:
        """The ranges that were taken."""
        return self.explained.partition

    @property
    def unresolved(self) -> list[TimestepRange]:
        """The bins that noise hides."""
        return list(compress(self.reading.map.bins, ~self.reading.bins.resolved))

    @property
    def weak(self) -> list[TimestepRange]:
        """The bins that may be resolved by luck."""
        return list(compress(self.reading.map.bins, self.reading.bins.weak))

    @property
    def is_given(self) -> bool:
        """Whether the ranges are your own."""
        return self.taken == GIVEN

    @property
    def inside(self) -> list[int]:
        """The cuts of ranges of your own that lie inside of bins."""
        outside = set(self.reading.map.bins.cuts)
        return [cut for cut in self.partition.cuts if self.is_given and cut not in outside]

    def document(self) -> dict[str, Any]:
        """Return JSON values only, None for what is not known."""
        map, blocks = self.reading.map, self.reading.blocks
        conclusion = {
            "verdict": self.verdict.document(),
            "bins": map.N,
            "groups": map.M,
            "batch_size": map.origin.batch_size,
            "draws": map.origin.draws,
            "ranges": self.ranges,
            "score": self.reading.score,
            "unresolved": _spans(self.unresolved),
            "weak": _spans(self.weak),
            "blocks": len(blocks),
            "known": json_number(blocks.known),
            "conflict": self.reading.conflict.document(),
            "cuts": {name: each and each.document() for name, each in self.cuts.items()},
            "judged": self.judged,
            "support": [asdict(each) for each in self.support],
            "held_out": {name: gain.document() for name, gain in self.held_out.items()},
            "row_sums": {**self.row_sums.ratio.document("ratio"), "rows": self.row_sums.rows},
            "advice": self.advice,
            "reason": self.reason,
            "taken": self.taken,
            "benefit": self.expected_gain.document(),
            "groups_needed": self.groups_needed,
        }
        if self.supported is None:
            return conclusion
        return {
            "partition": _spans(self.partition),
            "timesteps": map.T,
            "automatic": self.is_automatic,
            "supported": {"ranges": self.supported.chosen, "reason": self.supported.reason},
            **conclusion,
            "held_out_shares": [
                {"ranges": n, **{method: asdict(share) for method, share in row.items()}}
                for n, row in _shares_by_count(self.supported).items()
            ],
        }

    def lines(self) -> list[str]:
        """Return the conclusion for a person: what was found and what to do first."""
        map, blocks, rows = self.reading.map, self.reading.blocks, self.row_sums
        origin = map.origin
        size = f"{map.N} bins, {map.M} groups of {origin.batch_size}, {origin.draws} draws"
        merged = f"merged to {len(blocks)} blocks, resolved on {blocks.known:.0%} of [0, T)"
        ratio = f"|gbar|^2 / sum w |mu|^2 = {_pair(rows.ratio)}, {rows.rows} of {map.N} rows not 0"
        ranges = _counted(self.ranges, "range")
        rows_of_text = [
            ("verdict", str(self.verdict)),
            ("map", f"{size}, {self._unresolved}; {merged}"),
            *(("bins", self._split_bins) for _ in self.inside[:1]),
            ("row sums", f"{ratio} (near 0 at a converged base: bins must then oppose each other)"),
            *((name, str(each) if each else "no cut") for name, each in self.cuts.items()),
            *((f"cut {each.cut}", self._supported(each)) for each in self.support),
            *(
                ("held out", f"{self.judged} explains {_pair(gain, '+.2f')} more than {other}")
                for other, gain in self.held_out.items()
            ),
            *(
                ("advice", f"{self.advice} for {ranges}: {self.reason}")
                for _ in range(self.judged != GIVEN)
            ),
            ("taken", f"the {self.taken} cut into {ranges}"),
            ("benefit", self.expected_gain.sentence),
        ]
        if self.expected_gain.is_promised:
            rows_of_text.append(("plain SGD", self.expected_gain.plain))
        lines = [f"{label:12}  {text}" for label, text in rows_of_text]
        if self.supported is None:
            return lines
        spans = " ".join(f"[{span.start}, {span.stop})" for span in self.partition)
        shares = {str(n): row for n, row in _shares_by_count(self.supported).items()}
        caption = "explained on held-out groups"
        return [
            *lines,
            *estimate_table("ranges", shares, str(self.ranges), caption),
            f"{'supported':12}  {self.supported.chosen}: {self.supported.reason}",
            f"{'ranges':12}  {spans}, {self.taken}",
        ]

    def _supported(self, cut: CutSupport) -> str:
        draws = f"in {cut.support:.0%} of bootstrap draws"
        if cut.low is None:
            return f"the gradient's own {self.ranges} ranges have a cut within a bin {draws}"
        return f"{draws}, 90 % between {cut.low} and {cut.high}"

    @property
    def _split_bins(self) -> str:
        places = ", ".join(map(str, self.inside))
        text = f"no bin is cut at {places}: the gradient of such a bin counts on both sides"
        return f"{text}; `demerge analyze --ranges {self.partition.text}` cuts bins there"

    @property
    def _unresolved(self) -> str:
        text = f"{_counted(len(self.unresolved), 'bin')} unresolved"
        if self.unresolved and self.groups_needed < MOST_GROUPS:
            text += f" ({self.groups_needed} groups or more would do)"
        return text + (f", {len(self.weak)} perhaps resolved by luck" if self.weak else "")


def _spans(ranges: Sequence[TimestepRange] | Partition) -> list[list[int]]:
    return [[span.start, span.stop] for span in ranges]


def _pair(estimate: Estimate | None, form: str = ".2f") -> str:
    if estimate is None or json_number(estimate.value) is None:
        return "unknown"
    return f"{estimate.value:{form}} ± {estimate.se:.2f}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _shares_by_count(count: RangeCount) -> dict[int, dict[str, Estimate]]:
    """Return the share that each method explains on held-out groups, by the number of ranges."""
    rows = enumerate(zip(*count.shares.values(), strict=True), 1)
    return {n: dict(zip(count.shares, row, strict=True)) for n, row in rows}


def summarize(
    reading: Reading,
    n: int | None = 4,
    method: str = "gradient",
    *,
    given: Partition | None = None,
    with_counts: bool = False,
) -> ConflictSummary:
    """Say what a map supports.

    Args:
        n: number of ranges; None is the number that cross-validation supports, or that of `given`.
        method: one of METHODS, or `advised`: `gradient` or `uniform`, whichever the advice is.
        given: a partition of your own to be judged and taken, with the method `given`.
        with_counts: whether the summary says how many ranges are supported, as `demerge ranges`
            does.

    Raises:
        UsageError: if the method is unknown.
    """
    check_choice("method", method, (ADVISED, *METHODS))
    is_automatic = n is None and given is None
    counted = None
    if with_counts or is_automatic:
        counted = cross_validation(reading, "gradient" if method == ADVISED else method)
    if given is not None:
        n, method = len(given), GIVEN
    elif n is None and counted is not None:
        n = counted.chosen
    assert n is not None
    partitions: dict[str, Partition | None] = {} if given is None else {GIVEN: given}
    obstacles: dict[str, str] = {}
    for each in METHODS:
        try:
            partitions[each] = reading.partition(n, each)
        except NumericalError as error:
            partitions[each], obstacles[each] = None, error.what
    cuts: dict[str, Explained | None] = dict.fromkeys(partitions)
    for name, ranges in partitions.items():
        if ranges is not None:
            share = reading.explained_share(ranges) if reading.is_sure else None
            cuts[name] = Explained(ranges, share)
    judged = method if method in (*ADAPTIVE, GIVEN) else "gradient"
    best = partitions[judged]
    if best is None or not reading.is_sure:
        advice, reason = "uniform", obstacles.get(judged) or reading.doubt
    else:
        advice, reason = advised_method(reading, best, judged)
    taken = advice if method == ADVISED else method
    partition = partitions[taken]
    if partition is None:
        taken, partition = "uniform", Partition.uniform(reading.map.T, n)
    is_judged = best is not None and reading.is_sure and n > 1
    conclusion = verdict(reading, given)
    return ConflictSummary(
        reading=reading,
        verdict=conclusion,
        ranges=n,
        cuts=cuts,
        judged=judged,
        support=_support(reading, judged, best),
        held_out=gains_over_fixed(reading, best, judged) if best and is_judged else {},
        row_sums=row_sums(reading),
        advice=advice,
        reason=reason,
        taken=taken,
        expected_gain=expected_gain(reading, partition, taken, conclusion.reason),
        groups_needed=sample_size(reading.map, reading.bins),
        supported=counted if with_counts else None,
        is_automatic=is_automatic,
    )


def _support(reading: Reading, judged: str, best: Partition | None) -> tuple[CutSupport, ...]:
    """Return how often the bootstrap puts a cut where the judged partition has it.

    A given partition is held against the draws of the gradient's cuts into as many ranges: its own
    places do not vary.
    """
    if best is None or len(best) == 1 or not reading.blocks.is_enough:
        return ()
    try:
        draws = drawn_cuts(reading, len(best), "gradient" if judged == GIVEN else judged)
    except NumericalError:  # noise leaves no such cuts to hold given ones against
        return ()
    rows = support(reading.map, best, draws) if len(draws) else []
    if judged == GIVEN:
        rows = [CutSupport(each.cut, each.support, None, None) for each in rows]
    return tuple(rows)


def row_sums(reading: Reading) -> RowSums:
    """Check whether the base has converged: some K_ij must then be negative."""
    w, K = reading.map.widths, reading.bins.K
    ratio = reading.estimate(lambda K: K @ w @ w / (np.diagonal(K, axis1=-2, axis2=-1) @ w))
    rows = abs(K @ w) > estimate_error(reading.pairs @ w).half()
    return RowSums(ratio, int(rows.sum()))
