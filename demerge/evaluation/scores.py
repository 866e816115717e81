"""Scores with their protocol, and the rows of a table that they make.

Numbers compare only if their protocols are equal, field by field; `ensure_alike` names the fields that differ. A model's score
is its mean over sampling seeds. `demerge.evaluation.report.significance` says which differences count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from demerge.errors import ComparisonError, InputError, UsageError
from demerge.evaluation.metrics.range_losses import RangeLosses
from demerge.storage.atomic import commit_json
from demerge.storage.safetensors_header import read_json
from demerge.storage.schema import checked

FORMAT = "demerge.scores/1"
Kind = Literal["real", "base", "joint", "expert", "ensemble", "merge", "model"]
Key = tuple[str, Kind]  # of a row: model and kind
HIGHER_IS_BETTER = frozenset({"precision", "recall", "density", "coverage", "diversity"})


@dataclass(frozen=True, slots=True)
class Protocol:
    """All that must be equal for two scores to compare.

    Raises:
        UsageError: where a count is below 2.
    """

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

    def __post_init__(self) -> None:
        if min(self.num_images, self.reference_n) < 2:
            raise UsageError(
                f"{self.num_images} images against {self.reference_n} do not compare",
                fix="give at least 2 of each",
            )

    @property
    def rank_deficient(self) -> bool:
        """Whether one side has no more images than features, n <= D."""
        return min(self.num_images, self.reference_n) <= self.dim

    @property
    def title(self) -> str:
        """The distance as it is printed: on the features of a random net it is no known metric, and says so."""
        return "distance on random features" if self.features == "random" else self.distance

    def __repr__(self) -> str:
        """Say the protocol in one line, without whole hashes."""
        return f"Protocol({self})"

    def __str__(self) -> str:
        sampler = f"{self.sampler}, {self.steps} steps" if self.steps else self.sampler
        sampler += f", guidance {self.guidance_scale:g}" if self.guidance_scale > 1 else ""
        return (
            f"{self.title} of {self.num_images:,} images against {self.reference_n:,} of {self.reference}; {sampler}; "
            f"features {self.features} ({self.features_sha256[:12]}), preprocess {self.preprocess}"
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one model on one sampling seed.

    `metrics` holds `fd` and, where they were measured, `kid`, `precision`, `recall`, `density`, `coverage`, `drift` (LPIPS to
    the base's images from the same noise) and `diversity` (mean LPIPS over pairs); `images` is the SHA-256 of the images.

    Raises:
        UsageError: where a metric is not finite or the kind is unknown.
    """

    model: str
    metrics: Mapping[str, float]
    protocol: Protocol
    images: str
    seed: int
    kind: Kind = "model"
    model_sha256: str = ""
    losses: RangeLosses | None = field(default=None)

    def __post_init__(self) -> None:
        bad = [name for name, value in self.metrics.items() if not math.isfinite(value)]
        if bad:
            raise UsageError(
                f"{self.model}: {', '.join(bad)} not finite",
                fix="check the images that were scored",
            )
        if self.kind not in Kind.__args__:  # type: ignore[attr-defined]
            raise UsageError(f"kind '{self.kind}' is unknown", fix=f"use one of {Kind.__args__}")  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        """Name the model and its numbers, not the protocol and the hashes."""
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return f"Scores({self.model}, {self.kind}, seed {self.seed}: {numbers})"

    def save(self, path: Path | str) -> Path:
        """Write the scores as JSON."""
        path = Path(path)
        return commit_json(path, self.document())

    def document(self) -> dict[str, Any]:
        """Return the scores as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def load(cls, path: Path | str) -> Scores:
        """Read scores.

        Raises:
            InputError: where the file is damaged or of another format.
        """
        path = Path(path)
        document = read_json(path)
        fix = "make them with `demerge evaluate`"
        if document.pop("format", None) != FORMAT:
            raise InputError(f"{path}: not scores of demerge: it does not say '{FORMAT}'", fix=fix)
        return checked(document, cls, f"{path}: not scores of demerge", fix=fix)


@dataclass(frozen=True, slots=True)
class Row:
    """One model over all its seeds."""

    model: str
    kind: Kind
    scores: tuple[Scores, ...]

    def __repr__(self) -> str:
        """Name the model, its seeds and its distance."""
        return f"Row({self.model}, {self.kind}, {len(self.scores)} seeds: fd {self.mean('fd'):.4g})"

    @property
    def key(self) -> Key:
        """What tells the row from all others."""
        return self.model, self.kind

    @property
    def checkpoints(self) -> int:
        """How many different weights were scored under this name: one for each training seed."""
        return len({s.model_sha256 for s in self.scores})

    @property
    def seeds(self) -> tuple[int, ...]:
        """The sampling seeds, ascending."""
        return tuple(s.seed for s in self.scores)

    @property
    def losses(self) -> RangeLosses | None:
        """The validation losses, which do not depend on the sampling seed."""
        return next((s.losses for s in self.scores if s.losses is not None), None)

    def values(self, metric: str) -> list[float]:
        """The metric on each seed that has it."""
        return [s.metrics[metric] for s in self.scores if metric in s.metrics]

    def mean(self, metric: str) -> float:
        """The mean over seeds; NaN where the metric was not measured."""
        values = self.values(metric)
        return mean(values) if values else math.nan

    def sd(self, metric: str) -> float:
        """The standard deviation over seeds; NaN below two seeds."""
        values = self.values(metric)
        return stdev(values) if len(values) > 1 else math.nan


def rows_of(scores: Iterable[Scores]) -> list[Row]:
    """Gather scores by model, in order of first appearance, the seeds of each ascending.

    Raises:
        UsageError: where a model has two scores for one seed.
    """
    found: dict[tuple[str, Kind], list[Scores]] = {}
    for score in scores:
        found.setdefault((score.model, score.kind), []).append(score)
    rows = []
    for (model, kind), members in found.items():
        if len({s.seed for s in members}) < len(members):
            raise UsageError(
                f"{model}: two scores for one seed",
                fix="remove one of them or name the models differently",
            )
        rows.append(Row(model, kind, tuple(sorted(members, key=lambda s: s.seed))))
    return rows


def differences(a: Protocol, b: Protocol) -> str:
    """Name the fields that differ, with both values; "" if the two are equal."""
    pairs = ((f.name, getattr(a, f.name), getattr(b, f.name)) for f in fields(Protocol))
    return "; ".join(f"{name}: {own} | {other}" for name, own, other in pairs if own != other)


def ensure_alike(scores: Sequence[Scores]) -> Protocol:
    """Return the protocol that all scores share.

    Raises:
        ComparisonError: if two protocols differ; the fields and both values are named.
        UsageError: if there are no scores.
    """
    if not scores:
        raise UsageError("there are no scores to compare", fix="make some with `demerge evaluate`")
    first = scores[0]
    for other in scores[1:]:
        differing = differences(first.protocol, other.protocol)
        if differing:
            raise ComparisonError(
                f"{first.model} and {other.model} were scored under unlike protocols: {differing}",
                fix="evaluate both with the same options, or compare those that share a protocol",
            )
    return first.protocol


@dataclass(frozen=True, slots=True)
class Table:
    """Models that share a protocol, best first, and the noise floors against the same reference."""

    rows: list[Row]
    floors: list[Row]

    @property
    def protocol(self) -> Protocol:
        """The protocol that the models share."""
        return self.rows[0].scores[0].protocol


def tables_of(scores: Iterable[Scores]) -> list[Table]:
    """Group models by protocol, the largest group first.

    Raises:
        UsageError: if a model has two scores for one seed under one protocol, or there are no scores of a model.
    """
    groups: dict[Protocol, list[Scores]] = {}
    for score in scores:
        groups.setdefault(score.protocol, []).append(score)
    rows = {protocol: rows_of(group) for protocol, group in groups.items()}
    floors = [row for group in rows.values() for row in group if row.kind == "real"]
    models = [rank([row for row in group if row.kind != "real"]) for group in rows.values()]
    tables = [
        Table(group, [f for f in floors if _share_reference(f, group[0])])
        for group in models
        if group
    ]
    if not tables:
        raise UsageError(
            "there are no scores of a model to report", fix="make some with `demerge evaluate`"
        )
    return sorted(tables, key=lambda table: -len(table.rows))


def _share_reference(a: Row, b: Row) -> bool:
    names = (
        "features",
        "features_sha256",
        "preprocess",
        "distance",
        "reference_sha256",
        "reference_n",
    )
    own, other = a.scores[0].protocol, b.scores[0].protocol
    return all(getattr(own, name) == getattr(other, name) for name in names)


def rank(rows: Iterable[Row], metric: str = "fd") -> list[Row]:
    """Sort rows from best to worst mean of a metric.

    Raises:
        ComparisonError: if the protocols differ.
    """
    listed = [row for row in rows if row.values(metric)]
    if listed:
        ensure_alike([score for row in listed for score in row.scores])
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    return sorted(listed, key=lambda row: sign * row.mean(metric))
