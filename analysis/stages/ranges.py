"""Ranges from a map on disk: how many it supports, where they lie, what they gain, and what else there is.

The summary of report.py with the number of ranges by cross-fit (crossfit.py) where none is asked for, and with a cut of one's
own where one is given. The map alone is needed: no model, no data, no accelerator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from demerge.analysis.partitioning.bootstrap import Estimate
from demerge.analysis.partitioning.cross_validation import count
from demerge.analysis.partitioning.objective import METHODS, SCORES
from demerge.analysis.report.text import lines as summary_lines
from demerge.analysis.report.text import summary, taken
from demerge.conflict import ConflictMap
from demerge.errors import InputError, UsageError
from demerge.timesteps import Partition

ADVISED = "advised"


def ranges(
    map: ConflictMap,
    n: int | None = None,
    *,
    method: str = ADVISED,
    score: str = "step",
    minimum: int | None = None,
    given: Partition | None = None,
) -> dict[str, Any]:
    """Say into which ranges to cut and why: JSON values only.

    Args:
        n: number of ranges; None is the number that cross-fit finds, or that of `given`.
        method: one of METHODS, or `advised`: `gradient` where it beats uniform on held-out groups, else `uniform`.
        score: `step`, `energy` or `cosine`.
        minimum: least width of a range in bins for cuts that look at the map.
        given: a cut of one's own, to be judged and taken.

    Returns the keys of `summary` and `partition`, the ranges that were taken; `timesteps`, T; `automatic`, whether n was found;
    `supported`, n by cross-fit and its `reason`; `held_out_shares`, for each number of ranges what each method explains.

    Raises:
        UsageError: where an argument is out of its range.
    """
    _check(map, n, method, score, minimum)
    found = count(
        map, method="gradient" if method == ADVISED else method, score=score, minimum=minimum
    )
    counted = found if method in (ADVISED, "gradient") else None
    said = summary(
        map,
        n or found.chosen,
        method=method,
        score=score,
        minimum=minimum,
        given=given,
        counted=counted,
    )
    return {
        "partition": [[r.start, r.stop] for r in taken(map, said)],
        "timesteps": map.T,
        "automatic": n is None and given is None,
        "supported": {"ranges": found.chosen, "reason": found.reason},
        **said,
        "held_out_shares": _by_count(found.shares),
    }


def _check(map: ConflictMap, n: int | None, method: str, score: str, minimum: int | None) -> None:
    for name, value, known in (("method", method, (ADVISED, *METHODS)), ("score", score, SCORES)):
        if value not in known:
            raise UsageError(f"{name} '{value}' is unknown", fix=f"use one of {', '.join(known)}")
    if n is not None and not 1 <= n <= map.N:
        raise UsageError(
            f"{n} ranges, and the map has {map.N} bins", fix=f"give 1 <= n <= {map.N}, or auto"
        )
    parts = n or min(2, map.N)
    if minimum is not None and not 1 <= minimum <= map.N // parts:
        raise UsageError(
            f"minimum {minimum}: {parts} ranges of {minimum} bins or more do not fit the map's {map.N} bins",
            fix=f"give 1 <= minimum <= {map.N // parts}",
        )


def _by_count(shares: dict[str, list[Estimate]]) -> list[dict[str, Any]]:
    rows = zip(*shares.values(), strict=True)
    return [
        {
            "ranges": k + 1,
            **{name: {"value": e.value, "se": e.se} for name, e in zip(shares, row, strict=True)},
        }
        for k, row in enumerate(rows)
    ]


def given_cuts(text: str, total: int) -> Partition:
    """Read a list of inner cuts, `125,500`, for [0, total).

    Raises:
        UsageError: where it is no list of ascending timesteps between 0 and total.
    """
    fix = f"give timesteps between 0 and {total}, ascending, for example --cuts {total // 8},{total // 2}"
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text, re.ASCII):
        raise UsageError(f"cuts '{text}' are no list of timesteps", fix=fix)
    cuts = [int(word) for word in text.split(",")]
    if not all(a < b for a, b in pairwise([0, *cuts, total])):
        raise UsageError(f"cuts {cuts} do not ascend within ({0}, {total})", fix=fix)
    return Partition.from_cuts(total, cuts)


# -- files ---------------------------------------------------------------------------------------------------------------


def load_map(path: Path, model: str | None = None) -> ConflictMap:
    """Read a conflict.safetensors, or the one in a folder; refuse one of another model than `model`, where one is named.

    Raises:
        InputError: where there is no map, or it was measured on other weights or another schedule.
    """
    map = ConflictMap.load(path / "conflict.safetensors" if path.is_dir() else path)
    if model is None:
        return map
    from demerge.analysis.measurement.schedule import check_same_schedule
    from demerge.storage.checkpoint import Checkpoint
    from demerge.storage.hashing import remembered_content

    sha256 = remembered_content(Checkpoint.open(model))
    if sha256 != map.origin.model:
        raise InputError(
            f"{path} was measured on a model of sha256 {map.origin.model[:16]}..., {model} has {sha256[:16]}...",
            fix="name the base that the map was measured on, or measure this one with `demerge analyze`",
        )
    check_same_schedule(map, path, model)
    return map


def check_replaceable(out: Path) -> None:
    """Refuse a place for a partition that holds something else.

    Raises:
        UsageError: naming it.
    """
    if not out.exists():
        return
    try:
        Partition.load(out)
    except InputError as error:
        raise UsageError(
            f"{out} is there and is not a partition",
            fix="name another file, for example partition.json",
        ) from error


def page_beside(out: Path) -> Path:
    """Return the place of the page beside a partition: conflict.html in its folder.

    Raises:
        UsageError: where something else is there.
    """
    from demerge.analysis.report.page import NAME, check_replaceable

    check_replaceable(out.parent / NAME)
    return out.parent / NAME


def write_beside(
    map: ConflictMap,
    said: Mapping[str, Any],
    page: Path,
    *,
    stored: Path,
    out: Path,
    model: str | None = None,
    data: str | None = None,
    options: Sequence[str] = (),
    minimum: int | None = None,
) -> None:
    """Write the page of what `ranges` said of the map in `stored` and wrote to `out`; its commands name model and data."""
    from demerge.analysis.report.next_steps import Names
    from demerge.analysis.report.page import write_page

    names = Names(model or "MODEL", data or "DATA", tuple(options), stored, out)
    write_page(map, taken(map, said), said, page, names, minimum)


# -- for a person --------------------------------------------------------------------------------------------------------


def lines(said: dict[str, Any]) -> list[str]:
    """Return what `ranges` says, for a person: verdict, evidence, the table of numbers of ranges, and the result at the end."""
    supported = said["supported"]
    spans = " ".join(f"[{a}, {b})" for a, b in said["partition"])
    auto = f"{supported['ranges']}: {supported['reason']}"
    return [
        *summary_lines(said),
        *_table(said["held_out_shares"], said["ranges"]),
        f"{'supported':12}  {auto}",
        f"{'ranges':12}  {spans}, {said['taken']}",
    ]


def _table(rows: Sequence[dict[str, Any]], chosen: int) -> list[str]:
    if not rows:
        return []
    methods = [name for name in rows[0] if name != "ranges"]
    head = (
        f"{'ranges':>12}  "
        + "  ".join(f"{name:>13}" for name in methods)
        + "   explained on held-out groups"
    )
    body = [
        f"{row['ranges']:12}  "
        + "  ".join(f"{row[name]['value']:6.2f} ± {row[name]['se']:.2f}" for name in methods)
        + ("   <" if row["ranges"] == chosen else "")
        for row in rows
    ]
    return [head, *body]
