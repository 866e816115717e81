"""What a set of scores says in words: whether merging beat the base and the joint control, and what to be wary of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from demerge.evaluate.protocol import Comparison, Kind, Protocol, Row, Verdict, compare, ensure_alike, rank

ENOUGH = 10_000
MISSING: dict[Kind, str] = {"base": "base model", "joint": "joint control (same total steps, one range)"}
WORDS: dict[Verdict, str] = {
    "better": "beats",
    "worse": "is worse than",
    "inconclusive": "cannot be told apart from",
}


def best(rows: Sequence[Row], kind: Kind) -> Row | None:
    """Return the row of a kind with the lowest Frechet distance, or None."""
    ranked = rank([row for row in rows if row.kind == kind])
    return ranked[0] if ranked else None


def outcome(rows: Sequence[Row]) -> Verdict:
    """Return `better` where the best merge beats base and joint control, `worse` where it loses to one of them."""
    merge, controls = best(rows, "merge"), [best(rows, "base"), best(rows, "joint")]
    if merge is None or any(control is None for control in controls):
        return "inconclusive"
    verdicts = {compare(merge, control).verdict for control in controls if control is not None}
    return "worse" if "worse" in verdicts else "better" if verdicts == {"better"} else "inconclusive"


def verdict(rows: Sequence[Row]) -> str:
    """Say in one paragraph whether the best merge beat the base, the joint control and the routed ensemble."""
    merge = best(rows, "merge")
    if merge is None:
        return "There is no merged model among these scores, so there is nothing to say about merging."
    name = merge.scores[0].protocol.distance
    sentences = [f"The best merge, {merge.model}, has {name} {amount(merge)}."]
    for kind, title in (("base", "the base"), ("joint", "the joint control"), ("ensemble", "the routed ensemble")):
        control = best(rows, kind)  # type: ignore[arg-type]
        if control is not None:
            sentences.append(_against(merge, control, title))
        elif kind != "ensemble":
            sentences.append(f"Nothing can be said against {title}, which was not evaluated.")
    merges = sum(row.kind == "merge" for row in rows)
    if merges > 1:
        sentences.append(f"It was chosen among {merges} merges by the very numbers shown, which flatters it.")
    sentences.append(_conclusion(outcome(rows), rows))
    return " ".join(sentences)


def _against(merge: Row, control: Row, title: str) -> str:
    result = compare(merge, control)
    named = title if control.model in title else f"{title} ({control.model})"
    return (
        f"It {WORDS[result.verdict]} {named}, {amount(control)}: a difference of {result.difference:+.3g} "
        f"({result.relative:+.1%}), {_threshold(result)}."
    )


def _threshold(result: Comparison) -> str:
    if math.isinf(result.threshold):
        return "on a single common seed, which is not enough"
    return f"where {result.threshold:.2g} is needed to count"


def _conclusion(result: Verdict, rows: Sequence[Row]) -> str:
    if best(rows, "base") is None or best(rows, "joint") is None:
        return "Without both controls there is no conclusion."
    return {
        "better": "So here merging helped, beyond what the same training without ranges gives.",
        "worse": "So here merging did not help: a control does better.",
        "inconclusive": "So here it is not shown that merging helps beyond what a control gives.",
    }[result]


def amount(row: Row, metric: str = "fd") -> str:
    """Return `mean ± sd (n seeds)`."""
    spread = "" if math.isnan(row.sd(metric)) else f" ± {row.sd(metric):.2g}"
    seeds = len(row.values(metric))
    return f"{row.mean(metric):.2f}{spread} ({seeds} seed{'s' if seeds > 1 else ''})"


def warnings(rows: Sequence[Row], floors: Sequence[Row]) -> list[str]:
    """Return what a reader should be wary of, each as a sentence or two."""
    protocol = ensure_alike([score for row in rows for score in row.scores])
    kinds, seeds = {row.kind for row in rows}, min(len(row.seeds) for row in rows)
    found = [_few_images(protocol)]
    if not protocol.distance.startswith("FID"):
        found.append(f"{protocol.distance} is not FID: it uses the features of {protocol.features}, as no paper does.")
    if seeds < 3:
        found.append(f"A model has only {seeds} sampling seed(s): three are the least that give a standard deviation.")
    found += [f"No {name} was evaluated." for kind, name in MISSING.items() if kind not in kinds]
    if not floors:
        found.append("No noise floor was measured, so it is not known what a perfect model would score.")
    for floor in floors:
        found += _about_floor(rows, floor, protocol)
    return [text for text in found if text]


def _few_images(protocol: Protocol) -> str:
    count = min(protocol.num_images, protocol.reference_n)
    if protocol.rank_deficient:
        return (
            f"Rank-deficient: {count:,} images do not span {protocol.dim:,} features. {protocol.distance} is far too large "
            "in absolute terms and compares only within this table."
        )
    if count < ENOUGH:
        return (
            f"{count:,} images on one side: {protocol.distance} is biased upwards below some {ENOUGH:,} images and compares "
            "only within this table. KID is unbiased."
        )
    return ""


def _about_floor(rows: Sequence[Row], floor: Row, protocol: Protocol) -> list[str]:
    count = floor.scores[0].protocol.num_images
    if count < protocol.num_images:
        return [
            f"The noise floor comes from only {count:,} real images, the models' scores from {protocol.num_images:,}: the "
            "floor is too high by the bias of smaller numbers."
        ]
    return [
        f"{row.model} lies below the noise floor ({floor.mean('fd'):.2f}): closer to the reference than other real images. "
        "Differences down there mean nothing."
        for row in rows
        if row.mean("fd") < floor.mean("fd")
    ]
