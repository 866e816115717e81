"""What a set of scores says in words: whether merging beat the base and the joint control, and what to be wary of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from demerge.evaluation.report.significance import (
    LEAST_SEEDS,
    Comparison,
    Verdict,
    compare,
    detectable,
)
from demerge.evaluation.scores import Kind, Protocol, Row, ensure_alike, rank

ENOUGH = 10_000
FEW_SEEDS = 5
MISSING: dict[Kind, str] = {
    "base": "base model",
    "joint": "joint control (same total steps, one range)",
}
CHECKPOINTS = (
    "so a verdict is about these checkpoints, not about the method: on the digits, six joint controls that differ in their "
    "training seed alone spread by 5.8 %."
)
WORDS: dict[Verdict, str] = {
    "better": "beats",
    "worse": "is worse than",
    "inconclusive": "cannot be told apart from",
    "none": "was not tested against",
}


def best(rows: Sequence[Row], kind: Kind) -> Row | None:
    """Return the row of a kind with the lowest Frechet distance, or None."""
    ranked = rank([row for row in rows if row.kind == kind])
    return ranked[0] if ranked else None


def outcome(rows: Sequence[Row]) -> Verdict:
    """Return `better` if the best merge beats base and joint control, `worse` if it loses to one, `none` without a test."""
    merge, controls = best(rows, "merge"), [best(rows, "base"), best(rows, "joint")]
    if merge is None or None in controls:
        return "none"
    found = compare(rows)
    verdicts = {
        found[merge.key, control.key].verdict for control in controls if control is not None
    }
    for decisive in ("worse", "none", "inconclusive"):
        if decisive in verdicts:
            return decisive
    return "better"


def verdict(rows: Sequence[Row]) -> str:
    """Say in one paragraph whether the best merge beat the base, the joint control and the routed ensemble."""
    merge = best(rows, "merge")
    if merge is None:
        return (
            "There is no merged model among these scores, so there is nothing to say about merging."
        )
    found = compare(rows)
    name = merge.scores[0].protocol.title
    sentences = [f"The best merge, {merge.model}, has {name} {amount(merge)}."]
    for kind, title in (
        ("base", "the base"),
        ("joint", "the joint control"),
        ("ensemble", "the routed ensemble"),
    ):
        control = best(rows, kind)  # type: ignore[arg-type]
        if control is not None:
            sentences.append(_against(found[merge.key, control.key], control, title))
        elif kind != "ensemble":
            sentences.append(f"Nothing can be said against {title}, which was not evaluated.")
    merges = sum(row.kind == "merge" for row in rows)
    if merges > 1:
        sentences.append(
            f"It was chosen among {merges} merges by the very numbers shown, which flatters it."
        )
    sentences.append(_conclusion(outcome(rows), rows))
    return " ".join(sentences)


def _against(result: Comparison, control: Row, title: str) -> str:
    named = title if control.model in title else f"{title} ({control.model})"
    test = f"p = {result.p:.2g} over {result.family} comparisons" if not result.why else result.why
    return (
        f"It {WORDS[result.verdict]} {named}, {amount(control)}: a difference of {result.difference:+.3g} "
        f"({result.relative:+.1%}), {test}."
    )


def _conclusion(result: Verdict, rows: Sequence[Row]) -> str:
    if best(rows, "base") is None or best(rows, "joint") is None:
        return "Without both controls there is no conclusion."
    return {
        "better": "So this merge is better than both controls, beyond what the same training without ranges gives.",
        "worse": "So here merging is not the best choice: a control does better.",
        "inconclusive": "So here it is not shown that merging helps beyond what a control gives.",
        "none": "So there is no verdict.",
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
    found = [_training_seeds(rows), _few_images(protocol), _unusual_distance(protocol)]
    if seeds < LEAST_SEEDS:
        found.append(
            f"A model has only {seeds} sampling seed(s): a verdict needs {LEAST_SEEDS}, its power rises with more."
        )
    elif seeds < FEW_SEEDS:
        found.append(_power(rows, seeds))
    found += [f"No {name} was evaluated." for kind, name in MISSING.items() if kind not in kinds]
    if not floors:
        found.append(
            "No noise floor was measured, so it is not known what a perfect model would score."
        )
    for floor in floors:
        found += _about_floor(rows, floor, protocol)
    return [text for text in found if text]


def _training_seeds(rows: Sequence[Row]) -> str:
    trained = [row.checkpoints for row in rows if row.kind != "base"]
    if not trained or min(trained) == 1:
        return f"Training seeds: 1. Every model is one checkpoint, {CHECKPOINTS}"
    return f"Training seeds: {min(trained)} checkpoints stand under each name, sampled with different seeds."


def _power(rows: Sequence[Row], seeds: int) -> str:
    """Say how large a difference must be to count, "" if nothing is tested."""
    family = max((result.family for result in compare(rows).values()), default=0)
    if not family:
        return ""
    least, more = (
        detectable(seeds, family),
        (f"{detectable(n, family):.1f} with {n}" for n in (FEW_SEEDS, 2 * FEW_SEEDS)),
    )
    return (
        f"{seeds} sampling seeds and {family} comparisons: the surest difference counts from {least:.1f} standard deviations "
        f"of its paired values on ({', '.join(more)} seeds)."
    )


def _few_images(protocol: Protocol) -> str:
    count, dim, name = (
        min(protocol.num_images, protocol.reference_n),
        protocol.dim,
        _opening(protocol),
    )
    if protocol.rank_deficient:
        return (
            f"Rank-deficient: {count:,} images do not span {dim:,} features, so there is no verdict. {name} is far too large "
            f"in absolute terms; more than {dim:,} images on both sides are needed."
        )
    if count < ENOUGH:
        return (
            f"{count:,} images on one side: {protocol.title} is biased upwards below some {ENOUGH:,} images and compares only "
            "within this table. KID is unbiased."
        )
    return ""


def _unusual_distance(protocol: Protocol) -> str:
    if protocol.distance.startswith("FID"):
        return ""
    if protocol.features == "random":
        return (
            f"{_opening(protocol)} is not FID, nor any established metric: the features are those of a small net with random "
            "weights, which sees blur, noise and colour and is nearly blind to missing classes."
        )
    return f"{protocol.title} is not FID: it uses the features of {protocol.features}, as no paper does."


def _opening(protocol: Protocol) -> str:
    """Return the distance's name at the beginning of a sentence."""
    return f"The {protocol.title}" if protocol.features == "random" else protocol.title


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
