"""What a table of scores says in words: whether merging helped, what to do, what to be wary of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from demerge.evaluation.report.significance import (
    CONTROLS,
    LEAST_SEEDS,
    Comparison,
    Comparisons,
    Verdict,
    compare_rows,
    detectable,
)
from demerge.evaluation.scores import Kind, Protocol, Row, Table, rank

ENOUGH = 10_000
FEW_SEEDS = 5
ADVICE: dict[Kind, str] = {
    "base": "Name the base among the models of `demerge evaluate`.",
    "joint": "Train it with `demerge finetune --ranges joint` and evaluate it too.",
}
MISSING: dict[Kind, str] = {
    "base": "No base model was evaluated.",
    "joint": "No joint control (same total steps, one range) was evaluated.",
}
WORDS: dict[Verdict, str] = {
    "better": "beats",
    "worse": "is worse than",
    "inconclusive": "cannot be told apart from",
    "none": "was not tested against",
}


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """A table, and which of its differences count."""

    table: Table
    comparisons: Comparisons

    @classmethod
    def of(cls, table: Table) -> Findings:
        """Compare the models of a table."""
        return cls(table, compare_rows(table.rows))

    def best(self, kind: Kind) -> Row | None:
        """Return the row of a kind with the lowest Frechet distance."""
        return next(iter(rank(row for row in self.table.rows if row.kind == kind)), None)

    def against_controls(self, row: Row) -> dict[str, Comparison]:
        """Return how a row compares with the best base and the best joint control."""
        controls = {kind: self.best(kind) for kind in CONTROLS}
        return {
            kind: self.comparisons[row.key, control.key]
            for kind, control in controls.items()
            if control is not None and (row.key, control.key) in self.comparisons
        }

    @property
    def outcome(self) -> Verdict:
        """`better` if the best merge beats base and joint control, `worse` if it loses to one."""
        merge = self.best("merge")
        results = {} if merge is None else self.against_controls(merge)
        if len(results) < len(CONTROLS):
            return "none"
        verdicts = {result.verdict for result in results.values()}
        decisive: tuple[Verdict, ...] = ("worse", "none", "inconclusive")
        return next((verdict for verdict in decisive if verdict in verdicts), "better")

    @property
    def verdict(self) -> str:
        """What was found and what to do, then the numbers, in one paragraph."""
        merge = self.best("merge")
        if merge is None:
            return (
                "There is nothing to say about merging: no merged model was evaluated."
                " Make one with `demerge merge` and evaluate it next to its controls."
            )
        level = f"{merge.protocol.title} {amount(merge)}"
        sentences = [self._headline(merge), f"The best merge, {merge.model}, has {level}."]
        for kind, title in {**CONTROLS, "ensemble": "the routed ensemble"}.items():
            control = self.best(kind)
            if control is not None:
                result = self.comparisons[merge.key, control.key]
                sentences.append(_against(result, control, title))
        if (merges := sum(row.kind == "merge" for row in self.table.rows)) > 1:
            chosen = f"It was chosen among {merges} merges by these numbers: that flatters it."
            sentences.append(chosen)
        return " ".join(sentences)

    def _headline(self, merge: Row) -> str:
        results = self.against_controls(merge)
        for kind, title in CONTROLS.items():
            if kind not in results:
                return f"No verdict on merging: {title} was not evaluated. {ADVICE[kind]}"
        outcome = self.outcome
        if outcome == "better":
            return f"Merging helped: {merge.model} beats the base and the joint control. Use it."
        titles = [title for kind, title in CONTROLS.items() if results[kind].verdict == outcome]
        if outcome == "worse":
            lost = " and ".join(titles)
            return f"Merging did not help: the best merge is worse than {lost}. Use the better one."
        if outcome == "inconclusive":
            seeds = ",".join(map(str, range(2 * len(merge.seeds))))
            return (
                "It is not shown that merging helps: the best merge cannot be told apart from"
                f" {' and '.join(titles)}. Evaluate with more seeds: --seeds {seeds}."
            )
        why = next(result.why for result in results.values() if result.why)
        enough = f"more than {merge.protocol.dim} images: --num-images"
        least = f"at least {LEAST_SEEDS} seeds: --seeds 0,1,2"
        needs = enough if merge.protocol.is_rank_deficient else least
        return f"No verdict on merging: {why}. Evaluate with {needs}."

    @property
    def caveats(self) -> list[str]:
        """What a reader should be wary of, each as a sentence or two."""
        rows, protocol = self.table.rows, self.table.protocol
        kinds = {row.kind for row in rows}
        caveats = [
            self._about_training_seeds(),
            *(_about_images(protocol), _about_distance(protocol), self._about_seeds()),
            *(text for kind, text in MISSING.items() if kind not in kinds),
        ]
        if not self.table.floors:
            caveats.append("No noise floor was measured: the score of a perfect model is unknown.")
        for floor in self.table.floors:
            caveats += _about_floor(self.table, floor)
        return [text for text in caveats if text]

    def _about_training_seeds(self) -> str:
        models = [row.scores for row in self.table.rows if row.kind != "base"]
        trained = [len({score.model_sha256 for score in scores}) for scores in models]
        if not trained or min(trained) == 1:
            return (
                "Training seeds: 1. Every model is one checkpoint, so a verdict is about these"
                " checkpoints, not about the method. On the digits, six joint controls that differ"
                " in their training seed alone spread by 5.8 %."
            )
        return f"Training seeds: each name has {min(trained)} checkpoints, sampled with own seeds."

    def _about_seeds(self) -> str:
        seeds = min(len(row.seeds) for row in self.table.rows)
        if seeds < LEAST_SEEDS:
            return (
                f"A model has only {seeds} sampling seed(s). A verdict needs {LEAST_SEEDS}, and its"
                " power rises with more."
            )
        family = max((result.family for result in self.comparisons.values()), default=0)
        if seeds >= FEW_SEEDS or not family:
            return ""
        counts = (FEW_SEEDS, 2 * FEW_SEEDS)
        more = ", ".join(f"{detectable(n, family):.1f} with {n}" for n in counts)
        return (
            f"{seeds} sampling seeds and {family} comparisons: the surest difference counts from"
            f" {detectable(seeds, family):.1f} standard deviations of its paired values on"
            f" ({more} seeds)."
        )


def amount(row: Row) -> str:
    """Return `mean ± sd (n seeds)` of the Frechet distance."""
    spread = "" if math.isnan(row.sd("fd")) else f" ± {row.sd('fd'):.2g}"
    seeds = len(row.by_seed("fd"))
    return f"{row.mean('fd'):.2f}{spread} ({seeds} seed{'s' if seeds > 1 else ''})"


def _against(result: Comparison, control: Row, title: str) -> str:
    named = title if control.model in title else f"{title} ({control.model})"
    test = result.why or f"p = {result.p:.2g} over {result.family} comparisons"
    return (
        f"It {WORDS[result.verdict]} {named}, {amount(control)}: a difference of"
        f" {result.difference:+.3g} ({result.relative:+.1%}), {test}."
    )


def _about_images(protocol: Protocol) -> str:
    count, dim = min(protocol.num_images, protocol.reference_n), protocol.dim
    if protocol.is_rank_deficient:
        return (
            f"Rank-deficient: {count:,} images do not span {dim:,} features, so there is no"
            f" verdict. {_opening(protocol)} is far too large in absolute terms. Take more than"
            f" {dim:,} images on both sides."
        )
    if count < ENOUGH:
        return (
            f"{count:,} images on one side: {protocol.title} is biased upwards below some"
            f" {ENOUGH:,} images and compares only within this table. KID is unbiased."
        )
    return ""


def _about_distance(protocol: Protocol) -> str:
    if protocol.distance.startswith("FID"):
        return ""
    if protocol.features == "random":
        return (
            f"{_opening(protocol)} is not FID, nor any established metric. The features are those"
            " of a small net with random weights, which sees blur, noise and colour and is nearly"
            " blind to missing classes."
        )
    return f"{protocol.title} is not FID: no paper uses the features of {protocol.features}."


def _opening(protocol: Protocol) -> str:
    return f"The {protocol.title}" if protocol.features == "random" else protocol.title


def _about_floor(table: Table, floor: Row) -> list[str]:
    count, wanted, level = floor.protocol.num_images, table.protocol.num_images, floor.mean("fd")
    if count < wanted:
        return [
            f"The noise floor comes from only {count:,} real images, the models' scores from"
            f" {wanted:,}. The floor is too high by the bias of smaller numbers."
        ]
    return [
        f"{row.model} lies below the noise floor ({level:.2f}): closer to the reference than other"
        " real images. Differences down there mean nothing."
        for row in table.rows
        if row.mean("fd") < level
    ]
