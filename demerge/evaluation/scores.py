"""Scores with their protocol, and the rows of a table that they make.

Numbers compare only if their protocols are equal, field by field; `check_same_protocol` names the
fields that differ. A model's score is its mean over sampling seeds.
`demerge.evaluation.report.significance` says which differences count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, get_args

from demerge.errors import ComparisonError, InputError, UsageError
from demerge.evaluation.metrics.range_losses import RangeLosses
from demerge.storage.atomic import commit_json
from demerge.storage.safetensors_header import read_json
from demerge.storage.schema import checked

FORMAT = "demerge.scores/1"
Kind = Literal["real", "base", "joint", "expert", "ensemble", "merge", "model"]
Key = tuple[str, Kind]  # of a row: model and kind
HIGHER_IS_BETTER = frozenset({"precision", "recall", "density", "coverage", "diversity"})
MAKE_SCORES = "make scores with `demerge evaluate MODELS --data DATA -o DIR`"


@dataclass(frozen=True, slots=True)
class Protocol:
    """All that must be equal for two scores to compare."""

    features: str
    features_sha256: str
    preprocess: str
    distance: str
    dim: int
    num_images: int
    reference: str
    reference_n: int
    reference_sha256: str
    sampler: str
    steps: int
    perceptual: str = ""
    guidance_scale: float = 1.0
    mixed_precision: str = "no"  # of the sampler

    def __post_init__(self) -> None:
        if min(self.num_images, self.reference_n) < 2:
            what = f"{self.num_images} images against {self.reference_n} do not compare"
            raise UsageError(what, fix="give at least 2 of each")

    @property
    def is_rank_deficient(self) -> bool:
        """Whether one side has no more images than features, n <= D."""
        return min(self.num_images, self.reference_n) <= self.dim

    @property
    def title(self) -> str:
        """The distance as it is printed; on random features it is not a known metric."""
        return "distance on random features" if self.features == "random" else self.distance

    def __repr__(self) -> str:
        return f"Protocol({self})"

    def __str__(self) -> str:
        sampler = f"{self.sampler}, {self.steps} steps" if self.steps else self.sampler
        sampler += f", guidance {self.guidance_scale:g}" if self.guidance_scale > 1 else ""
        sampler += "" if self.mixed_precision == "no" else f", {self.mixed_precision}"
        return (
            f"{self.title} of {self.num_images:,} images against {self.reference_n:,} of"
            f" {self.reference}; {sampler}; features {self.features}"
            f" ({self.features_sha256[:12]}), preprocess {self.preprocess}"
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one model on one sampling seed.

    Attributes:
        metrics: `fd` and, if they were measured, `kid`, `precision`, `recall`, `density`,
            `coverage`, `drift` (LPIPS to the base's images from the same noise) and `diversity`
            (mean LPIPS over pairs).
        images: SHA-256 of the images.
    """

    model: str
    metrics: Mapping[str, float]
    protocol: Protocol
    images: str
    seed: int
    kind: Kind = "model"
    model_sha256: str = ""
    losses: RangeLosses | None = None

    def __post_init__(self) -> None:
        if bad := [name for name, value in self.metrics.items() if not math.isfinite(value)]:
            what = f"{self.model}: {', '.join(bad)} not finite"
            raise UsageError(what, fix="check the images that were scored")
        if self.kind not in get_args(Kind):
            fix = f"use one of {', '.join(get_args(Kind))}"
            raise UsageError(f"kind '{self.kind}' is unknown", fix=fix)

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return f"Scores({self.model}, {self.kind}, seed {self.seed}: {numbers})"

    def save(self, path: str | Path) -> Path:
        """Write the scores as JSON."""
        return commit_json(Path(path), self.document())

    def document(self) -> dict[str, Any]:
        """Return the scores as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read scores.

        Raises:
            InputError: if the file is damaged or of another format.
        """
        document, what = read_json(Path(path)), f"{path}: not scores of demerge"
        if document.pop("format", None) != FORMAT:
            raise InputError(f"{what}: it does not say '{FORMAT}'", fix=MAKE_SCORES)
        return checked(document, cls, what, fix=MAKE_SCORES)


@dataclass(frozen=True, slots=True)
class Row:
    """One model over all its seeds."""

    model: str
    kind: Kind
    scores: tuple[Scores, ...]

    def __repr__(self) -> str:
        return f"Row({self.model}, {self.kind}, {len(self.scores)} seeds: fd {self.mean('fd'):.4g})"

    @property
    def key(self) -> Key:
        """Model and kind, which no other row of a table has."""
        return self.model, self.kind

    @property
    def protocol(self) -> Protocol:
        """The protocol of all seeds."""
        return self.scores[0].protocol

    @property
    def seeds(self) -> tuple[int, ...]:
        """The sampling seeds, ascending."""
        return tuple(s.seed for s in self.scores)

    @property
    def losses(self) -> RangeLosses | None:
        """The validation losses, which do not depend on the sampling seed."""
        return next((s.losses for s in self.scores if s.losses is not None), None)

    def by_seed(self, metric: str) -> dict[int, float]:
        """Return the metric of each seed that has it."""
        return {s.seed: s.metrics[metric] for s in self.scores if metric in s.metrics}

    def mean(self, metric: str) -> float:
        """Return the mean over seeds; NaN if the metric was not measured."""
        values = self.by_seed(metric).values()
        return mean(values) if values else math.nan

    def sd(self, metric: str) -> float:
        """Return the standard deviation over seeds; NaN below two seeds."""
        values = self.by_seed(metric).values()
        return stdev(values) if len(values) > 1 else math.nan


def rows_of(scores: Iterable[Scores]) -> list[Row]:
    """Return scores by model, in order of first appearance, the seeds of each ascending."""
    groups: dict[Key, list[Scores]] = {}
    for score in scores:
        groups.setdefault((score.model, score.kind), []).append(score)
    rows = []
    for (model, kind), members in groups.items():
        row = Row(model, kind, tuple(sorted(members, key=lambda s: s.seed)))
        if len(set(row.seeds)) < len(members):
            fix = "remove one of them, or name the models differently: NAME=MODEL"
            raise UsageError(f"{model} has two scores for one seed", fix=fix)
        rows.append(row)
    return rows


def differences(a: Protocol, b: Protocol) -> str:
    """Return the fields that differ, with both values; "" if the two are equal."""
    pairs = ((f.name, getattr(a, f.name), getattr(b, f.name)) for f in fields(Protocol))
    return "; ".join(f"{name}: {own} | {other}" for name, own, other in pairs if own != other)


def check_same_protocol(rows: Sequence[Row]) -> None:
    """Check that all rows share one protocol.

    Raises:
        ComparisonError: if two protocols differ; the fields and both values are named.
    """
    scores = [score for row in rows for score in row.scores]
    for other in scores:
        if fields_ := differences(scores[0].protocol, other.protocol):
            raise ComparisonError(
                f"{scores[0].model} and {other.model} were scored under different protocols:"
                f" {fields_}",
                fix="evaluate both with the same options, or compare models that share a protocol",
            )


@dataclass(frozen=True, slots=True)
class Table:
    """Models that share a protocol, best first, and the noise floors against the same reference."""

    rows: list[Row]
    floors: list[Row]

    @property
    def protocol(self) -> Protocol:
        """The protocol that the models share."""
        return self.rows[0].protocol


def tables_of(scores: Iterable[Scores]) -> list[Table]:
    """Return the models grouped by protocol, the largest group first.

    Raises:
        UsageError: if a model has two scores for one seed, or there are no scores of a model.
    """
    groups: dict[Protocol, list[Scores]] = {}
    for score in scores:
        groups.setdefault(score.protocol, []).append(score)
    by_protocol = [rows_of(group) for group in groups.values()]
    floors = [row for rows in by_protocol for row in rows if row.kind == "real"]
    tables = []
    for rows in by_protocol:
        models = rank(row for row in rows if row.kind != "real")
        if models:
            same = _comparison_of(models[0])
            tables.append(
                Table(models, [floor for floor in floors if _comparison_of(floor) == same])
            )
    if not tables:
        raise UsageError("there are no scores of a model to report", fix=MAKE_SCORES)
    return sorted(tables, key=lambda table: -len(table.rows))


def _comparison_of(row: Row) -> tuple[object, ...]:
    """Return what models and noise floors must share: the feature net and the reference."""
    p = row.protocol
    net = (p.features, p.features_sha256, p.preprocess, p.distance)
    return (*net, p.reference_sha256, p.reference_n)


def rank(rows: Iterable[Row], metric: str = "fd") -> list[Row]:
    """Return rows from best to worst mean of a metric."""
    measured = [row for row in rows if row.by_seed(metric)]
    check_same_protocol(measured)
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    return sorted(measured, key=lambda row: sign * row.mean(metric))
