"""What a conflict map says, in a dictionary, in lines for a person, and in the files of an analysis.

OUT/conflict.safetensors   the map
OUT/partition.json         the cut that was asked for; uniform where noise leaves no gradient cut
OUT/summary.json           the verdict, shares of three cuts with errors, support of each cut, row-sum check, advice
OUT/*.svg, *.png           plots; *.dark.svg for dark pages
OUT/conflict.html          all of it on one page, and what to do next
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from demerge.analysis.partitioning.bootstrap import Estimate, Evidence, estimate, short, support
from demerge.analysis.partitioning.cross_validation import Count, unsure
from demerge.analysis.partitioning.expected_gain import benefit
from demerge.analysis.partitioning.objective import GIVEN, METHODS, cut
from demerge.analysis.partitioning.resolution import LEAST_KNOWN
from demerge.analysis.partitioning.sample_size import MOST, groups_needed
from demerge.analysis.report.verdict import advised, gains_over, verdict
from demerge.analysis.similarity import error, without_pair
from demerge.conflict import ConflictMap
from demerge.errors import NumericalError
from demerge.storage.atomic import commit_bytes, commit_json, commit_text, place_for
from demerge.timesteps import Partition


def summary(
    map: ConflictMap,
    n: int = 4,
    *,
    method: str = "gradient",
    score: str = "step",
    minimum: int | None = None,
    given: Partition | None = None,
    counted: Count | None = None,
) -> dict[str, Any]:
    """Say what the map supports: JSON values only, None for what cannot be said.

    Args:
        n: number of ranges; that of `given` where there is one.
        method: one of METHODS, or `advised`: `gradient` or `uniform`, whichever the advice is.
        minimum: least width of a range in bins for cuts that look at the map; None is that of `cut`.
        given: a cut of one's own to be judged and taken, called `given`.
        counted: what `count` found by `gradient` with this score and minimum, if known.

    Keys: `verdict`, of the map alone: what was found and what to do; bins, groups, batch_size, draws, ranges, score;
    `unresolved` ranges of t, and `weak` ones, which may be resolved by luck; `blocks` and the share of [0, T) `known` by
    them; `conflict` (J of all blocks apart); `cuts` by method, each with cuts, share, se; `judged`, the cut that the next
    three are about: what was asked for, or gradient if that does not look at the map; `support` of each of its cuts, `low`
    and `high` None if it is given; its `held_out` gain over uniform and logsnr; `advice`, it or uniform, and its `reason`;
    `row_sums`; `taken`, what was asked for, or uniform if that finds no cut; `benefit`, what training experts of the cut that
    was taken promises; `groups_needed` for all bins to be resolved.

    Raises:
        UsageError: if a score or method is unknown.
    """
    evidence, n = Evidence.of(map, score), n if given is None else len(given)
    cuts, why = _cuts(map, n, score, minimum)
    if given is not None:
        cuts, method = {"given": given, **cuts}, "given"
    judged = "gradient" if method in ("advised", *GIVEN) else method
    best = cuts[judged]
    held_out = (
        gains_over(evidence, judged, best, minimum) if best and evidence.sure and n > 1 else {}
    )
    advice, reason = _advice(evidence, best, judged, why.get(judged, ""), held_out, minimum)
    asked = advice if method == "advised" else method
    chosen = asked if cuts[asked] else "uniform"
    partition = cuts[chosen] or Partition.uniform(map.T, n)
    said = verdict(evidence, minimum, counted)
    return {
        "verdict": said.document(),
        "bins": map.N,
        "groups": map.M,
        "batch_size": map.origin.batch_size,
        "draws": map.origin.draws,
        "ranges": n,
        "score": score,
        "unresolved": [
            [r.start, r.stop]
            for r, known in zip(map.bins, evidence.found.resolved, strict=True)
            if not known
        ],
        "weak": [
            [r.start, r.stop] for r, weak in zip(map.bins, evidence.found.weak, strict=True) if weak
        ],
        "blocks": len(evidence.blocks),
        "known": short(evidence.blocks.known),
        "conflict": _number(evidence.conflict),
        "cuts": {name: _described(evidence, partition) for name, partition in cuts.items()},
        "judged": judged,
        "support": _support(evidence, judged, best, minimum),
        "held_out": {name: _number(gain) for name, gain in held_out.items()},
        "row_sums": row_sums(map),
        "advice": advice,
        "reason": reason,
        "taken": chosen,
        "benefit": benefit(evidence, partition, chosen, minimum, said.reason).document(),
        "groups_needed": groups_needed(map, evidence.found),
    }


def _cuts(
    map: ConflictMap, n: int, score: str, minimum: int | None
) -> tuple[dict[str, Partition | None], dict[str, str]]:
    """Return the cut of each method, None where it cannot be made, and why it cannot."""
    cuts: dict[str, Partition | None] = {}
    why: dict[str, str] = {}
    for method in METHODS:
        try:
            cuts[method] = cut(map, n, method, score=score, minimum=minimum)
        except NumericalError as error:
            cuts[method], why[method] = None, error.what
    return cuts, why


def _advice(
    evidence: Evidence,
    best: Partition | None,
    judged: str,
    why: str,
    held_out: dict[str, Estimate],
    minimum: int | None,
) -> tuple[str, str]:
    if best is None or not evidence.sure:
        return "uniform", why or unsure(evidence)
    return advised(evidence, best, judged, minimum, held_out)


def _described(evidence: Evidence, partition: Partition | None) -> dict[str, Any] | None:
    if partition is None:
        return None
    share = evidence.share(partition) if evidence.sure else Estimate(math.nan, math.nan)
    return {"cuts": partition.cuts, "share": short(share.value), "se": short(share.se)}


def _support(
    evidence: Evidence, judged: str, best: Partition | None, minimum: int | None
) -> list[dict[str, Any]]:
    """Say how often the bootstrap puts a cut where the judged one has it, and where else: `low` and `high`, 90 % of its draws.

    A given cut is held against the draws of the gradient's cut into as many ranges: its own places do not vary.
    """
    if best is None or len(best) == 1 or evidence.blocks.known < LEAST_KNOWN:
        return []
    try:
        draws = evidence.bootstrap(len(best), "gradient" if judged == "given" else judged, minimum)
    except NumericalError:  # noise leaves no such cut to hold a given one against
        return []
    rows = support(evidence.map, best, draws) if len(draws) else []
    spread = [(None, None) if judged == "given" else (low, high) for *_, low, high in rows]
    return [
        {"cut": place, "support": share, "low": low, "high": high}
        for (place, share, *_), (low, high) in zip(rows, spread, strict=True)
    ]


def row_sums(map: ConflictMap) -> dict[str, Any]:
    """Check whether the base has converged: then every row sum_j w_j K_ij = <mu_i, gbar> is 0, and some K_ij must be negative.

    Returns `ratio`, |gbar|^2 / sum_i w_i |mu_i|^2 (0 converged, 1 where all bins pull alike) with its `se`, and `rows`, how
    many of the N rows differ from 0 by more than a 95 % interval.
    """
    w, K = map.widths, Evidence.of(map).found.K
    ratio = estimate(map, lambda K: K @ w @ w / (np.diagonal(K, axis1=-2, axis2=-1) @ w), K)
    rows = abs(K @ w) > error(without_pair(map) @ w).half()
    return {"ratio": short(ratio.value), "se": short(ratio.se), "rows": int(rows.sum())}


def _number(estimate: Estimate) -> dict[str, float | None]:
    return {"value": short(estimate.value), "se": short(estimate.se)}


def lines(said: dict[str, Any]) -> list[str]:
    """Return a summary for a person."""
    rows = said["row_sums"]
    text = [
        ("verdict", f"{said['verdict']['found']} {said['verdict']['do']}"),
        (
            "map",
            f"{said['bins']} bins, {said['groups']} groups of {said['batch_size']}, {said['draws']} draws,"
            f" {_unresolved(said)}; "
            f"merged to {said['blocks']} blocks, resolved on {said['known']:.0%} of [0, T)",
        ),
        (
            "row sums",
            f"|gbar|^2 / sum w |mu|^2 = {_pair(rows['ratio'], rows['se'])},"
            f" {rows['rows']} of {said['bins']} rows not 0 (near 0 at a converged base: opposing bins are then a must)",
        ),
    ]
    for name, described in said["cuts"].items():
        found = (
            "no cut"
            if described is None
            else f"{described['cuts']} explains {_pair(described['share'], described['se'])}"
        )
        text.append((name, found))
    for row in said["support"]:
        text.append((f"cut {row['cut']}", _supported(said, row)))
    for other, gain in said["held_out"].items():
        held_out = f"{said['judged']} explains {_pair(gain['value'], gain['se'], '+.2f')} more than {other}"
        text.append(("held out", held_out))
    ranges = _counted(said["ranges"], "range")
    text.append(("advice", f"{said['advice']} for {ranges}: {said['reason']}"))
    text.append(("taken", f"the {said['taken']} cut into {ranges}"))
    text.append(("benefit", said["benefit"]["sentence"]))
    if said["benefit"]["promised"]:
        text.append(("plain SGD", said["benefit"]["plain"]))
    return [f"{label:12}  {found}" for label, found in text]


def _supported(said: dict[str, Any], row: dict[str, Any]) -> str:
    if row["low"] is None:
        return f"the gradient's own {said['ranges']} ranges have a cut within a bin in {row['support']:.0%} of bootstrap draws"
    return (
        f"in {row['support']:.0%} of bootstrap draws, 90 % between {row['low']} and {row['high']}"
    )


def _unresolved(said: dict[str, Any]) -> str:
    within_reach = said["unresolved"] and said["groups_needed"] < MOST
    more = f" ({said['groups_needed']} groups or more would do)" if within_reach else ""
    weak = f", {len(said['weak'])} perhaps resolved by luck" if said["weak"] else ""
    return f"{_counted(len(said['unresolved']), 'bin')} unresolved{more}{weak}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _pair(value: float | None, se: float | None, form: str = ".2f") -> str:
    return "unknown" if value is None else f"{value:{form}} ± {math.nan if se is None else se:.2f}"


def taken(map: ConflictMap, said: Mapping[str, Any]) -> Partition:
    """Return the cut that a summary says was taken."""
    return Partition.from_cuts(map.T, said["cuts"][said["taken"]]["cuts"])


def write(
    map: ConflictMap,
    out: Path | str,
    said: dict[str, Any],
    *,
    model: str = "MODEL",
    data: str = "DATA",
    options: Sequence[str] = (),
    stored: bool = False,
) -> list[Path]:
    """Write map, the cut that was taken, summary, plots and page into the folder OUT; return what was written.

    Args:
        model, data, options: what the map was measured on, and words that say how data is read, for the commands on the page.
        stored: whether the map lies in OUT already, where another process may have extended it since; it is left alone then.
    """
    out = place_for(out)
    from demerge.analysis.report.next_steps import Names
    from demerge.analysis.report.page import NAME, page, pictures
    from demerge.reporting.theme import render

    written = [out / "conflict.safetensors" if stored else map.save(out / "conflict.safetensors")]
    partition = taken(map, said)
    partition.save(out / "partition.json")
    commit_json(out / "summary.json", said)
    written += [out / "partition.json", out / "summary.json"]
    figures, shown = pictures(map, partition, said)
    for name, figure in figures.items():
        pictures_of = {
            "svg": shown[name].data,
            "dark.svg": shown[name].dark or b"",
            "png": render(figure, "png"),
        }
        for kind, picture in pictures_of.items():
            written.append(commit_bytes(out / f"{name}.{kind}", picture))
    names = Names(model, data, tuple(options), out, out / "partition.json")
    return [*written, commit_text(out / NAME, page(map, partition, said, shown, names))]
