"""The page of an analysis, `conflict.html`, and all files of an analysis.

OUT/conflict.safetensors   the map
OUT/partition.json         the ranges that were asked for; uniform if noise leaves no gradient cut
OUT/summary.json           the conclusion, see summary.py
OUT/*.svg, *.png           plots; *.dark.svg for dark pages
OUT/conflict.html          all of it on one page, and what to do next

The page says first what was found and what to do. It loads nothing, runs nothing, and is light or
dark as the reader's screen is. Its commands can be copied as they stand if the model and the data
are known by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from demerge.analysis.partitioning.expected_gain import BATCH
from demerge.analysis.report.next_steps import CommandNames, Step, next_steps
from demerge.analysis.report.plots import report_plots
from demerge.analysis.report.summary import ConflictSummary, RowSums
from demerge.analysis.report.verdict import GIVEN, list_cuts
from demerge.analysis.similarity import Estimate
from demerge.conflict import ConflictMap
from demerge.reporting.html import PageFigure, escape, figure, render_page, section, table
from demerge.reporting.theme import Pictures, pictures
from demerge.storage.atomic import commit_bytes, commit_json, commit_text, place_for
from demerge.timesteps import TimestepRange

NAME = "conflict.html"
FOOTER = (
    "Made by demerge from a conflict map. The same numbers are in conflict.safetensors next to it;"
    " `demerge ranges` partitions it again."
)
CAPTIONS = {
    "heatmap": "Cosine of the mean gradients of two bins of timesteps. Warm: one step helps both."
    " Cold: what helps one harms the other. Above the diagonal: its standard error. Hatched: noise"
    " hides it. Dotted: a bin may be resolved by luck. Dashed: the cuts.",
    "curve": "Share of the conflict that cuts resolve, judged on groups that did not choose them,"
    " with standard errors. Pale: judged on the groups that chose them, which flatters the cuts.",
    "support": "Where cuts land if the groups are resampled. Tall bars are places that do not"
    " depend on a few samples.",
    "similarity": "How similarity falls with the distance of timesteps. The naive cosine of the"
    " literature is biased by noise that bins share.",
    "strength": "Left: how strongly each bin pulls. Right: the number of samples at which noise is"
    " as large as that pull.",
}
RANGES = (
    "Missed: the part of what a first AdamW step along the range's own gradient gains there that"
    " a joint step of the same length does not, with its 95 % interval. It is 1 - the cosine of"
    " the two: above 100 % the joint step does harm there. Pull: the length of the range's"
    " gradient against the mean. Unequal pulls alone are no conflict. Support: how often"
    " resampled groups put a cut near the end of the range."
)
MEASURED = (
    "Gradients of one base on groups of samples. Only products of different groups count, so"
    " that noise neither invents similarity nor hides it. Errors come from the spread between"
    " pairs of groups or, for held-out shares, between groups."
)
HEADS = ("timesteps", "of all", "pull", "missed by a joint step", "95 % interval", "support of end")


def conflict_page(
    summary: ConflictSummary, plots: Mapping[str, PageFigure], names: CommandNames
) -> str:
    """Return the page of a summary; `plots` are pictures by name, as in CAPTIONS."""
    map, sure = summary.reading.map, ""
    if summary.explained.share is not None and (gallery := _figures(plots, "curve", "support")):
        sure = section("How sure the cut is", "", f'<div class="gallery">{gallery}</div>')
    sections = [
        _verdict(summary),
        section("The map", "", figure(plots["heatmap"])),
        _tiles(summary),
        section("The ranges", RANGES, table(HEADS, _ranges(summary))),
        section("What to do next", "", _steps(next_steps(summary, names))),
        sure,
        section("How the gradients change", "", _figures(plots, "similarity", "strength")),
        section("How it was measured", MEASURED, _origin(map)),
    ]
    is_named = (names.model, names.data) != ("MODEL", "DATA")
    bare = f"model of sha256 {map.origin.model[:16]}"
    subtitle = f"{names.model} on {names.data}" if is_named else bare
    return render_page(summary.verdict.headline, subtitle, sections, FOOTER)


def _figures(plots: Mapping[str, PageFigure], *names: str) -> str:
    return "".join(figure(plots[name]) for name in names if name in plots)


def _verdict(summary: ConflictSummary) -> str:
    verdict, partition = summary.verdict, summary.partition
    kind = "better" if verdict.is_promised else "inconclusive"
    more = _reason(summary)
    is_judged = partition == verdict.partition or verdict.method == GIVEN
    if len(partition) > 1 and not is_judged:
        promise = summary.expected_gain
        held_out = ", judged on samples that did not choose the cut" if promise.is_held_out else ""
        more += f" Of this cut: {promise.sentence}{held_out}."
    text = f"<p>{escape(verdict)}</p>\n<p>{escape(more)}</p>"
    return f'<section class="verdict {kind}">\n{text}</section>'


def _reason(summary: ConflictSummary) -> str:
    """Return which ranges were taken and why, in a sentence."""
    if len(summary.partition) == 1:
        reason = summary.supported.reason if summary.supported else summary.reason
        return f"The timesteps stay in one range: {reason}."
    why = summary.reason
    if summary.taken != summary.advice:
        why = f"as was asked; advised is {summary.advice}, as {summary.reason}"
    cuts, n = list_cuts(summary.partition), len(summary.partition)
    return f"The timesteps are cut at {cuts} into {n} ranges, the {summary.taken} cut: {why}."


def _tiles(summary: ConflictSummary) -> str:
    map, promise = summary.reading.map, summary.expected_gain
    share = summary.explained.share or Estimate(math.nan, math.nan)
    resolved = f"{map.N - len(summary.unresolved)} of {map.N}"
    joint = "of what separate AdamW steps gain is missed by a joint one, by direction alone"
    noisy = f"with the noise of batches of {BATCH} and unequal lengths too"
    explained = f"of the conflict is resolved by this cut{_error(share.se)}"
    tiles = [
        (resolved, "bins whose mean gradient stands out from noise"),
        _lowest_cosine(summary),
        (_percent(share.value), explained),
        (_percent(promise.share.value), joint),
        (_percent(promise.batch.value), noisy),
        _joint(summary.row_sums),
    ]
    if summary.supported is not None:
        count = str(summary.supported.chosen)
        tiles.append((count, "ranges are supported by held-out samples"))
    form = '<div class="tile"><b>{}</b><span>{}</span></div>'
    boxes = [form.format(escape(number), escape(meaning)) for number, meaning in tiles]
    return f'<div class="tiles">{"".join(boxes)}</div>'


def _joint(sums: RowSums) -> tuple[str, str]:
    """Return |gbar|^2 / sum_i w_i |mu_i|^2, a ratio that noise can carry anywhere."""
    ratio = sums.ratio
    if not math.isfinite(ratio.value) or not ratio.se <= 0.5:
        return "?", "of all pull is joint: noise hides it"
    meaning = f"of all pull is joint{_error(ratio.se)}"
    return _percent(ratio.value), f"{meaning}; near 0 the base has converged, and bins must oppose"


def _lowest_cosine(summary: ConflictSummary) -> tuple[str, str]:
    """Return the lowest cosine of two resolved bins, and which they are."""
    map, rho = summary.reading.map, summary.reading.bins.cosine
    if not np.isfinite(rho).any() or map.N == 1:
        return "?", "lowest cosine of two bins: none is resolved"
    i, j = sorted(divmod(int(np.nanargmin(rho)), map.N))
    meaning = f"lowest cosine, of the bins {_span(map.bins[i])} and {_span(map.bins[j])}"
    return f"{np.clip(rho[i, j], -1, 1):.2f}", meaning


def _ranges(summary: ConflictSummary) -> Iterable[list[str]]:
    """Return a row of the table for each range."""
    is_judged = summary.taken == summary.judged
    support = {each.cut: f"{each.support:.0%}" for each in summary.support if is_judged}
    for gain in summary.expected_gain.ranges:
        length = gain.length.value
        share = f"{len(gain.span) / summary.reading.map.T:.0%}"
        pull = f"{length:.1f} ×" if math.isfinite(length) else "?"
        missed, interval = gain.missed, "noise hides it"
        if missed.is_known:
            interval = f"{missed.low:.0%} to {missed.high:.0%}"
        end = support.get(gain.span.stop, "")
        yield [_span(gain.span), share, pull, _percent(missed.value), interval, end]


def _span(span: TimestepRange) -> str:
    return f"{span.start}–{span.stop}"


def _percent(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "?"


def _error(se: float) -> str:
    return f", ± {se:.0%}" if math.isfinite(se) else ""


def _steps(steps: Sequence[Step]) -> str:
    blocks = []
    for step in steps:
        commands = "\n".join(step.commands)
        blocks.append(f'<p class="step">{escape(step.text)}</p>\n<pre>{escape(commands)}</pre>')
    return "\n".join(blocks)


def _origin(map: ConflictMap) -> str:
    facts = {"bins": map.N, "groups": f"{map.M} of {map.origin.batch_size} samples"}
    for name, value in asdict(map.origin).items():
        if name != "batch_size" and value != "":
            facts[name] = value
    facts["antithetic"] = map.origin.noise
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(facts[name])}</dd>" for name in facts)
    return f"<dl>{''.join(rows)}</dl>"


def draw_plots(summary: ConflictSummary) -> dict[str, Pictures]:
    """Draw the plots of a summary, by file name."""
    return {name: pictures(draw) for name, draw in report_plots(summary).items()}


def write_page(
    summary: ConflictSummary,
    path: str | Path,
    names: CommandNames,
    plots: Mapping[str, Pictures] | None = None,
) -> Path:
    """Write the page; the plots are drawn if they are not given."""
    figures: dict[str, PageFigure] = {}
    for name, plot in (plots or draw_plots(summary)).items():
        figures[name] = PageFigure(CAPTIONS[name], plot.svg, dark=plot.dark)
    return commit_text(path, conflict_page(summary, figures, names))


def write_report(
    summary: ConflictSummary,
    out: Path | str,
    names: CommandNames = CommandNames(),
    *,
    is_stored: bool = False,
) -> list[Path]:
    """Write map, partition, summary, plots and page into the folder OUT; return what was written.

    Args:
        names: the model and the data that the commands on the page name.
        is_stored: whether the map lies in OUT already, where another process may have extended it
            since. It is left alone then.
    """
    out = place_for(out)
    map, partition = out / "conflict.safetensors", out / "partition.json"
    if not is_stored:
        summary.reading.map.save(map)
    summary.partition.save(partition)
    commit_json(out / "summary.json", summary.document())
    written, plots = [map, partition, out / "summary.json"], draw_plots(summary)
    for name, plot in plots.items():
        for file, picture in plot.files(name).items():
            written.append(commit_bytes(out / file, picture))
    names = replace(names, map=out, partition=partition)
    return [*written, write_page(summary, out / NAME, names, plots)]
