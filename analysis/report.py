"""What a conflict map says, in a dictionary, in lines for a person, and in the files of an analysis.

OUT/conflict.safetensors   the map
OUT/partition.json         the cut that was asked for; uniform where noise leaves no gradient cut
OUT/summary.json           shares of three cuts with errors, support of each cut, row-sum check, advice
OUT/*.svg, *.png           plots
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from demerge.analysis.evidence import Estimate, Evidence, estimate, support
from demerge.analysis.plots import figures, render
from demerge.analysis.segmentation import METHODS, cut
from demerge.analysis.similarity import leave_one_out, standard_error, t_quantile
from demerge.conflict import ConflictMap
from demerge.errors import NumericalError
from demerge.files import commit_file, commit_json
from demerge.timesteps import Partition

BEAT = 2.0


def summary(map: ConflictMap, n: int = 4, *, method: str = "gradient", score: str = "cosine") -> dict[str, Any]:
    """Say what the map supports: JSON values only, None for what cannot be said.

    Keys: bins, groups, batch_size, draws, ranges, score; `unresolved` ranges of t; `blocks` and the share of
    [0, T) `known` by them; `conflict` (J of all blocks apart); `cuts`
    by method, each with cuts, share, se; `support` of each gradient cut; `held_out` gain over uniform and logsnr;
    `row_sums`; `advice`, the method to take, and its `reason`; `taken`, the `method` asked for, or uniform where that finds no
    cut.
    """
    evidence = Evidence.of(map, score)
    cuts, why = _cuts(map, n, score)
    best = cuts["gradient"]
    held_out = {other: evidence.held_out_gain(n, other) for other in METHODS[1:]} if best and evidence.sure and n > 1 else {}
    advice, reason = _advice(evidence, n, why, held_out)
    return {
        "bins": map.N,
        "groups": map.M,
        "batch_size": map.origin.batch_size,
        "draws": map.origin.draws,
        "ranges": n,
        "score": score,
        "unresolved": [[r.start, r.stop] for r, known in zip(map.bins, evidence.found.resolved, strict=True) if not known],
        "blocks": len(evidence.blocks),
        "known": _finite(evidence.blocks.known),
        "conflict": _number(evidence.conflict),
        "cuts": {name: _described(evidence, partition) for name, partition in cuts.items()},
        "support": _support(evidence, best, n),
        "held_out": {name: _number(gain) for name, gain in held_out.items()},
        "row_sums": row_sums(map),
        "advice": advice,
        "reason": reason,
        "taken": method if cuts[method] else "uniform",
    }


def _cuts(map: ConflictMap, n: int, score: str) -> tuple[dict[str, Partition | None], str]:
    """Return the cut of each method, None for a gradient cut that cannot be made, and why it cannot."""
    cuts: dict[str, Partition | None] = dict.fromkeys(METHODS)
    cuts |= {method: cut(map, n, method) for method in METHODS[1:]}
    try:
        cuts["gradient"] = cut(map, n, score=score)
    except NumericalError as error:
        return cuts, error.what
    return cuts, ""


def _advice(evidence: Evidence, n: int, why: str, held_out: dict[str, Estimate]) -> tuple[str, str]:
    if why or n == 1:
        return "uniform", why or "one range leaves nothing to choose"
    if not evidence.sure:
        return "uniform", "no conflict between bins is resolved"
    if len(evidence.blocks) == n:
        return "uniform", f"noise leaves {n} blocks of bins, so that there was one way to cut and nothing to choose"
    gain = held_out["uniform"]
    if gain.above(BEAT):
        return "gradient", f"on held-out groups the gradient cut explains {gain} more of the conflict than uniform"
    return "uniform", f"on held-out groups the gradient cut gains {gain} over uniform, less than {BEAT:g} SE"


def _described(evidence: Evidence, partition: Partition | None) -> dict[str, Any] | None:
    if partition is None:
        return None
    share = evidence.share(partition) if evidence.sure else Estimate(math.nan, math.nan)
    return {"cuts": partition.cuts, "share": _finite(share.value), "se": _finite(share.se)}


def _support(evidence: Evidence, best: Partition | None, n: int) -> list[dict[str, Any]]:
    if best is None or n == 1:
        return []
    keys = ("cut", "support", "low", "high")
    return [dict(zip(keys, row, strict=True)) for row in support(evidence.map, best, evidence.bootstrap(n))]


def row_sums(map: ConflictMap) -> dict[str, Any]:
    """Check whether the base has converged: then every row sum_j w_j K_ij = <mu_i, gbar> is 0, and some K_ij must be negative.

    Returns `ratio`, |gbar|^2 / sum_i w_i |mu_i|^2 (0 converged, 1 where all bins pull alike) with its `se`, and `rows`, how
    many of the N rows differ from 0 by more than a 95 % interval.
    """
    w, K, left_out = map.widths, Evidence.of(map).found.K, leave_one_out(map)
    ratio = estimate(map, lambda K: K @ w @ w / (np.diagonal(K, axis1=-2, axis2=-1) @ w), K)
    rows = abs(K @ w) > t_quantile(map.M) * standard_error(left_out @ w)
    return {"ratio": _finite(ratio.value), "se": _finite(ratio.se), "rows": int(rows.sum())}


def _number(estimate: Estimate) -> dict[str, float | None]:
    return {"value": _finite(estimate.value), "se": _finite(estimate.se)}


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def lines(said: dict[str, Any]) -> list[str]:
    """Return a summary for a person."""
    text = [
        f"map       {said['bins']} bins, {said['groups']} groups of {said['batch_size']}, {said['draws']} draws,"
        f" {len(said['unresolved'])} bins unresolved; "
        f"merged to {said['blocks']} blocks, resolved on {said['known']:.0%} of [0, T)",
        f"row sums  |gbar|^2 / sum w |mu|^2 = {_pair(said['row_sums']['ratio'], said['row_sums']['se'])},"
        f" {said['row_sums']['rows']} of {said['bins']} rows not 0 (near 0 at a converged base: opposing bins are then a must)",
    ]
    for name, described in said["cuts"].items():
        found = "no cut" if described is None else f"{described['cuts']} explains {_pair(described['share'], described['se'])}"
        text.append(f"{name:9} {found}")
    for row in said["support"]:
        text.append(
            f"cut {row['cut']:4}  in {row['support']:.0%} of bootstrap draws, 90 % between {row['low']} and {row['high']}"
        )
    return [*text, f"advice    {said['advice']}: {said['reason']}", f"taken     the {said['taken']} cut"]


def _pair(value: float | None, se: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f} ± {math.nan if se is None else se:.2f}"


def write(map: ConflictMap, out: Path, said: dict[str, Any]) -> list[Path]:
    """Write map, the cut that was taken, summary and plots into the folder OUT; return what was written."""
    written = [map.save(out / "conflict.safetensors")]
    partition = cut(map, said["ranges"], said["taken"], score=said["score"])
    partition.save(out / "partition.json")
    commit_json(out / "summary.json", said)
    written += [out / "partition.json", out / "summary.json"]
    for name, figure in figures(map, partition, score=said["score"]).items():
        for kind in ("svg", "png"):
            picture = render(figure, kind)
            written.append(commit_file(out / f"{name}.{kind}", lambda stream, picture=picture: stream.write(picture)))  # type: ignore[misc]
    return written
