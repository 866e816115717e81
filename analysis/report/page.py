"""The page of an analysis, `conflict.html`: verdict, heat map, the few numbers, what to do next, how it was measured.

It loads nothing, runs nothing, and is light or dark as the reader's screen is. Commands on it can be copied as they stand where
the model and the data are known by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from demerge.analysis.partitioning.cross_validation import count
from demerge.analysis.partitioning.objective import FOUND
from demerge.analysis.report.next_steps import Names, steps
from demerge.analysis.report.plots import figures
from demerge.analysis.report.verdict import listed
from demerge.analysis.similarity import similarity
from demerge.conflict import ConflictMap
from demerge.errors import UsageError
from demerge.reporting.html import PageFigure, escape, figure, render_page, section, table
from demerge.reporting.theme import DARK, render
from demerge.storage.atomic import commit_text
from demerge.timesteps import Partition

NAME = "conflict.html"
FOOTER = "Made by demerge from a conflict map. The same numbers lie beside it in conflict.safetensors; `demerge ranges` cuts anew."
CAPTIONS = {
    "heatmap": "Cosine of the mean gradients of two bins of timesteps: warm, one step helps both; cold, what helps one "
    "harms the other. Above the diagonal its standard error; hatched, noise hides it; dotted, a "
    "bin may be resolved by luck; dashed, the cuts.",
    "curve": "Share of the conflict that cuts resolve, judged on groups that did not choose them, with standard errors; pale, "
    "the same judged on the groups that did, which flatters it.",
    "support": "Where cuts land when the groups are resampled: tall bars are places that do not hang on a few samples.",
    "similarity": "How similarity falls with the distance of timesteps. The naive cosine, as the literature takes it, is "
    "bent by noise that bins share.",
    "strength": "Left, how strongly each bin pulls; right, the number of samples at which noise is as large as that pull.",
}


def page(
    map: ConflictMap,
    partition: Partition,
    said: Mapping[str, Any],
    shown: Mapping[str, PageFigure],
    names: Names,
) -> str:
    """Return the page of a map and its summary; `shown` are pictures by name, as in CAPTIONS."""
    sections = [
        _verdict(partition, said),
        section("The map", "", figure(shown["heatmap"])),
        _tiles(map, said),
        section("The ranges", RANGES, _ranges(map, partition, said)),
        section("What to do next", "", _steps(map, partition, said, names)),
        _sure(said, shown),
        section("How the gradients change", "", _figures(shown, "similarity", "strength")),
        section("How it was measured", MEASURED, _origin(map)),
    ]
    subtitle = (
        f"{names.model} on {names.data}"
        if (names.model, names.data) != ("MODEL", "DATA")
        else _bare(map)
    )
    return render_page("How the timesteps conflict", subtitle, sections, FOOTER)


RANGES = (
    "Missed: the part of what a first AdamW step along the range's own gradient gains there that a joint step of the same "
    "length does not, with its 95 % interval. It is 1 - the cosine of the two: above 100 % the joint step does harm there. "
    "Pull: the length of the range's gradient against the mean; unequal pulls alone are no conflict. Support: how often "
    "resampled groups put a cut near the end of the range."
)
MEASURED = (
    "Gradients of one base on groups of samples; products of different groups alone count, so that noise neither invents "
    "similarity nor hides it. Errors come from the spread between pairs of groups, or, of held-out shares, between groups."
)


def _sure(said: Mapping[str, Any], shown: Mapping[str, PageFigure]) -> str:
    """Return what the cut explains and where it lands again; nothing where noise hides it."""
    if said["cuts"][said["taken"]]["share"] is None:
        return ""
    found = _figures(shown, "curve", "support")
    return (
        section("How sure the cut is", "", f'<div class="gallery">{found}</div>') if found else ""
    )


def _figures(shown: Mapping[str, PageFigure], *names: str) -> str:
    return "".join(figure(shown[name]) for name in names if name in shown)


def _bare(map: ConflictMap) -> str:
    return f"model of sha256 {map.origin.model[:16]}"


# -- the verdict ---------------------------------------------------------------------------------------------------------


EYEBROWS = {
    "conflict": "Separate experts promise a gain",
    "alike": "No promise: train jointly",
    "unresolved": "No promise: too little is resolved",
}


def _verdict(partition: Partition, said: Mapping[str, Any]) -> str:
    verdict = said["verdict"]
    kind = "better" if verdict["promised"] else "inconclusive"
    more = _cut(partition, said)
    if len(partition) > 1 and partition.cuts != verdict["cuts"]:
        more = f"{more} {_promise(said)}"
    return (
        f'<section class="verdict {kind}"><div class="eyebrow">{escape(EYEBROWS[verdict["kind"]])}</div>\n'
        f"<p>{escape(verdict['found'])} {escape(verdict['do'])}</p>\n<p>{escape(more)}</p></section>"
    )


def _cut(partition: Partition, said: Mapping[str, Any]) -> str:
    """Say what was cut and why, in one sentence."""
    reason = said.get("supported", said)["reason"] if len(partition) == 1 else said["reason"]
    if len(partition) == 1:
        return f"The timesteps stay in one range: {reason}."
    taken, advice = said["taken"], said["advice"]
    why = reason if taken == advice else f"as was asked; advised is {advice}, as {reason}"
    return f"The timesteps are cut at {listed(partition)} into {len(partition)} ranges, the {taken} cut: {why}."


def _promise(said: Mapping[str, Any]) -> str:
    sentence = said["benefit"]["sentence"]
    judged = (
        ", judged on samples that did not choose the cut" if said["benefit"]["held_out"] else ""
    )
    return f"Of this cut: {sentence}{judged}."


# -- the numbers ---------------------------------------------------------------------------------------------------------


def _tiles(map: ConflictMap, said: Mapping[str, Any]) -> str:
    promise, explained = said["benefit"], said["cuts"][said["taken"]]
    shown = [
        (
            f"{map.N - len(said['unresolved'])} of {map.N}",
            "bins whose mean gradient stands out from noise",
        ),
        _opposed(map),
        (
            _percent(explained["share"]),
            f"of the conflict is resolved by this cut{_error(explained['se'])}",
        ),
        (
            _percent(promise["share"]["value"]),
            "of what separate AdamW steps gain is missed by a joint one, by direction alone",
        ),
        (
            _percent(promise["batch"]["value"]),
            f"with the noise of batches of {promise['batch']['size']} and unequal lengths too",
        ),
        _joint(said["row_sums"]),
    ]
    if "supported" in said:
        shown.append((str(said["supported"]["ranges"]), "ranges are supported by held-out samples"))
    return '<div class="tiles">' + "".join(_tile(*tile) for tile in shown) + "</div>"


def _tile(number: str, meaning: str) -> str:
    return f'<div class="tile"><b>{escape(number)}</b><span>{escape(meaning)}</span></div>'


def _joint(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return |gbar|^2 / sum_i w_i |mu_i|^2, a ratio that noise can carry anywhere."""
    if row["ratio"] is None or row["se"] is None or row["se"] > 0.5:
        return "?", "of all pull is joint: noise hides it"
    return (
        _percent(row["ratio"]),
        f"of all pull is joint{_error(row['se'])}; near 0 the base has converged, and bins must oppose",
    )


def _opposed(map: ConflictMap) -> tuple[str, str]:
    """Return the lowest cosine of two resolved bins, and where it is."""
    rho = similarity(map).cosine
    if not np.isfinite(rho).any() or map.N == 1:
        return "?", "lowest cosine of two bins: none is resolved"
    i, j = sorted(divmod(int(np.nanargmin(rho)), map.N))
    return (
        f"{np.clip(rho[i, j], -1, 1):.2f}",
        f"lowest cosine, of the bins {_span(map.bins[i])} and {_span(map.bins[j])}",
    )


def _ranges(map: ConflictMap, partition: Partition, said: Mapping[str, Any]) -> str:
    support = {
        row["cut"]: f"{row['support']:.0%}"
        for row in said["support"]
        if said["taken"] == said["judged"]
    }
    rows = [
        [
            _span(span),
            f"{len(span) / map.T:.0%}",
            _times(row["length"]["value"]),
            _percent(row["missed"]["value"]),
            _between(row["missed"]),
            support.get(span.stop, ""),
        ]
        for span, row in zip(partition, said["benefit"]["ranges"], strict=True)
    ]
    return table(
        [
            "timesteps",
            "of all",
            "pull",
            "missed by a joint step",
            "95 % interval",
            "support of its end",
        ],
        rows,
    )


def _span(span: Any) -> str:
    return f"{span.start}–{span.stop}"


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{value:.0%}"


def _times(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f} ×"


def _error(se: float | None) -> str:
    return "" if se is None else f", ± {se:.0%}"


def _between(share: Mapping[str, float | None]) -> str:
    low, high = share["low"], share["high"]
    return "noise hides it" if low is None or high is None else f"{low:.0%} to {high:.0%}"


# -- what to do next -----------------------------------------------------------------------------------------------------


def _steps(map: ConflictMap, partition: Partition, said: Mapping[str, Any], names: Names) -> str:
    found = steps(map, partition, said, names)
    return "\n".join(
        f'<p class="step">{escape(why)}</p>\n<pre>{escape(chr(10).join(run))}</pre>'
        for why, run in found
    )


# -- how it was measured -------------------------------------------------------------------------------------------------


def _origin(map: ConflictMap) -> str:
    facts = {"bins": map.N, "groups": f"{map.M} of {map.origin.batch_size} samples"}
    facts |= {
        f.name.replace("_", " "): getattr(map.origin, f.name)
        for f in fields(map.origin)
        if f.name != "batch_size"
    }
    facts |= {"antithetic": map.origin.noise}
    rows = (
        f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"
        for key, value in facts.items()
        if value != ""
    )
    return f"<dl>{''.join(rows)}</dl>"


# -- files ---------------------------------------------------------------------------------------------------------------


def pictures(
    map: ConflictMap, partition: Partition, said: Mapping[str, Any], minimum: int | None = None
) -> tuple[dict[str, Figure], dict[str, PageFigure]]:
    """Draw the plots of a summary: figures on white, and the page's pictures for light and dark."""
    method, score = said["judged"] if said["judged"] in FOUND else "gradient", said["score"]
    counted = count(map, method=method, score=score, minimum=minimum)
    given: dict[str, Any] = {
        "score": score,
        "method": method,
        "minimum": minimum,
        "counted": counted,
    }
    light, dark = figures(map, partition, **given), figures(map, partition, **given, theme=DARK)
    shown = {
        name: PageFigure(CAPTIONS[name], render(each), dark=render(dark[name]))
        for name, each in light.items()
    }
    return light, shown


def write_page(
    map: ConflictMap,
    partition: Partition,
    said: Mapping[str, Any],
    path: Path,
    names: Names,
    minimum: int | None = None,
) -> Path:
    """Draw the plots and write the page.

    Raises:
        UsageError: where the place holds something else.
    """
    check_replaceable(path)
    return commit_text(
        path, page(map, partition, said, pictures(map, partition, said, minimum)[1], names)
    )


def check_replaceable(path: Path) -> None:
    """Refuse a place for the page that holds something else.

    Raises:
        UsageError: naming it.
    """
    if path.exists() and (not path.is_file() or FOOTER.encode() not in path.read_bytes()):
        raise UsageError(
            f"{path} is there and is not a page of a conflict map",
            fix="name a file in another folder",
        )
