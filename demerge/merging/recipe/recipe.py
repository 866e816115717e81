"""What is merged and how: the recipe, as asked for and, once its inputs are known, as canonical JSON.

    base: ./base                        # a path, relative to the recipe's folder, or a Hub id
    experts:
      - {path: ./expert-0, weight: 0.5, range: [0, 500]}
      - {path: ./expert-1, weight: 0.5, range: [500, 1000]}
    method: ties                        # the rest is optional
    options: {density: 0.2}
    rules: ["up weights=0.2..0.8,0.5", {match: mid, options: {density: 0.5}}]
    only: [down, mid, up]
    seed: 0
    save_dtype: keep
    no_base: false                      # true: the experts alone, the first of them, which may be left out, in the base's place

A finished merge holds its recipe three times: in `demerge.json`, in the metadata of the weights, and, for people, in the
model card. It then names every input with the SHA-256 of its files, all options, and the versions. It holds no clock and
no machine: the same inputs and versions make the same bytes. `output` is the SHA-256 of the weights, in `demerge.json` alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from demerge.errors import InputError, UsageError
from demerge.merging.recipe.fields import (
    MergeFields,
    Source,
    expanded,
    read_rule,
    read_source,
    read_weights,
    texts,
)
from demerge.merging.recipe.mergekit import MARK, from_mergekit
from demerge.merging.recipe.paths import found
from demerge.merging.recipe.rules import Rule
from demerge.storage.documents import check_known_keys, read_document, typed
from demerge.storage.safetensors_header import read_header

FORMAT = "demerge.recipe/1"
METADATA = "demerge.recipe"
DOCUMENT = "demerge.json"
KINDS: Mapping[str, Any] = {
    "format": str, "base": (str, dict), "experts": list, "method": str, "options": dict, "weights": (list, str), "rules": list,
    "only": list, "seed": int, "save_dtype": str, "variant": str, "out_rank": int, "boundary": (int, float), "versions": dict,
    "output": dict, "skip_text_encoder": bool, "missing": str, "extra": str, "components": str, "no_base": bool,
}  # fmt: skip
READ = (
    "format",
    "base",
    "experts",
    "weights",
    "rules",
)  # by functions of their own; the others are taken as they are
EXPERT = ("path", "weight", "range", "files", "inputs")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge as it is asked for; see `MergeFields`. Files and versions are known once `prepare` has seen the inputs.

    Raises:
        UsageError: where the seed is negative, or the rank of an adapter below 1.
    """

    base: Source
    experts: Sequence[Source]
    method: str = "task_arithmetic"
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[float] | None = None
    rules: Sequence[Rule] = ()
    only: Sequence[str] = ()
    seed: int = 0
    save_dtype: str = "keep"
    variant: str | None = None
    out_rank: int | None = None
    boundary: float | None = None
    skip_text_encoder: bool = False
    missing: str = "error"
    extra: str = "error"
    components: str | None = None
    no_base: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    output: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Name the method and the models, not what is known of their files."""
        return f"Recipe({self.method}: {self.base.path!r}, experts {[expert.path for expert in self.experts]})"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("seed", self.seed, 0),
            ("out_rank", 1 if self.out_rank is None else self.out_rank, 1),
        ):
            if value < least:
                raise UsageError(f"{name} is {value}", fix=f"give {least} or more")

    @classmethod
    def of(
        cls, base: Path | str, experts: Sequence[Path | str], **asked: Unpack[MergeFields]
    ) -> Recipe:
        """Return the recipe for a base and its experts.

        Raises:
            UsageError: where a rule cannot be read, or the ranges are not one for each expert.
        """
        empty = cls(
            Source(str(base)), [Source(path) for given in experts for path in expanded(str(given))]
        )
        return empty.changed(**asked)

    def changed(self, **asked: Unpack[MergeFields]) -> Recipe:
        """Return the recipe with other values; options are added to those there are, the base to the experts for `no_base`.

        Raises:
            UsageError: as for `of`.
        """
        values: dict[str, Any] = dict(asked)
        ranges = values.pop("ranges", None)
        experts = list(self.experts)
        if values.get("no_base") and not self.no_base:
            experts = [self.base, *experts]
        if ranges is not None:
            if len(ranges) != len(experts):
                raise UsageError(
                    f"{len(ranges)} ranges for {len(experts)} experts",
                    fix="give --range once for each expert",
                )
            experts = [
                replace(expert, range=span) for expert, span in zip(experts, ranges, strict=True)
            ]
        if "rules" in values:
            values["rules"] = [
                rule if isinstance(rule, Rule) else Rule.parse(rule) for rule in values["rules"]
            ]
        values["options"] = {**self.options, **(values.get("options") or {})}
        return replace(self, experts=experts, **values)

    @classmethod
    def read(cls, path: Path | str) -> Recipe:
        """Read a recipe: YAML, JSON, a merged .safetensors file, or a folder with demerge.json.

        Raises:
            InputError: where the file is missing, damaged or holds no recipe.
            UsageError: where a key is unknown or a value wrong.
        """
        path = Path(path)
        path = path / DOCUMENT if path.is_dir() else path
        if path.suffix != ".safetensors":
            return cls.parse(read_document(path), path.parent, str(path))
        text = read_header(path).metadata.get(METADATA)
        if text is None:
            raise InputError(f"{path} holds no recipe", fix="name a model that demerge merged")
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: its recipe is damaged: {str(error)[:80]}", fix="use demerge.json"
            ) from error
        return cls.parse(document, home_of(path), str(path))

    @classmethod
    def parse(cls, document: Any, folder: Path, where: str) -> Recipe:
        """Return the recipe that JSON or YAML values in a file of `folder` describe.

        Raises:
            UsageError: where a key is unknown or a value wrong, saying `where`.
        """
        if isinstance(document, dict) and MARK in document:
            document = from_mergekit(document, where)
        if not isinstance(document, dict) or not document.get("experts"):
            raise UsageError(
                f"{where} names no base and experts",
                fix="write base: PATH and experts: [PATH, ...]",
            )
        if not document.get("base") and document.get("no_base") is not True:
            raise UsageError(
                f"{where} names no base",
                fix="write base: PATH, or no_base: true to merge the experts alone",
            )
        check_known_keys(document, KINDS, where)
        if str(document.get("format", FORMAT)) != FORMAT:
            raise UsageError(
                f"{where} has the format {document['format']}", fix=f"this version reads {FORMAT}"
            )
        values = {
            key: typed(document, key, KINDS[key], where) for key in document if key not in READ
        }
        if ".py:" in (
            values.get("method") or ""
        ):  # a recipe may come from anywhere, and must not name what to run
            raise UsageError(
                f"{where} names the file of a method",
                fix=f"give it yourself: --method {values['method']}",
            )
        values |= {key: texts(values[key]) for key in ("versions", "output") if values.get(key)}
        values["only"] = [str(pattern) for pattern in values.get("only") or ()]
        options = values.get("options") or {}
        values["options"] = {
            k: [found(str(p), folder) for p in v] if isinstance(v, list) else v
            for k, v in options.items()
        }
        listed: list[Any] = []
        for entry in typed(document, "experts", list, where):
            path = found(entry, folder) if isinstance(entry, str) else ""
            inside = expanded(path) if path else []
            listed += [entry] if inside in ([], [path]) else map(os.path.abspath, inside)
        whole, rules = read_weights(document, listed, folder, where)
        experts = [
            read_source(entry, folder, f"{where}: expert {i}", EXPERT)
            for i, entry in enumerate(listed)
        ]
        base = Source(experts[0].path)
        if document.get("base"):
            base = read_source(document["base"], folder, f"{where}: base", ("path", "files"))
        if values.get("no_base") and base.path != experts[0].path:
            experts = [base, *experts]
        return cls(
            base=base,
            experts=experts,
            weights=whole,
            rules=[
                *(read_rule(entry, where) for entry in typed(document, "rules", list, where) or ()),
                *rules,
            ],
            **{key: value for key, value in values.items() if value is not None},
        )

    def stored(self, folder: Path) -> Recipe:
        """Return the recipe as it is written in `folder`, paths relative to it."""
        return replace(
            self,
            base=self.base.stored(folder),
            experts=[expert.stored(folder) for expert in self.experts],
        )

    def document(self) -> dict[str, Any]:
        """Return the recipe as JSON values; what is not asked for is left out."""
        more = {
            "rules": [rule.document() for rule in self.rules],
            **{
                name: getattr(self, name)
                for name in ("only", "variant", "out_rank", "boundary", "skip_text_encoder")
            },
            **{name: getattr(self, name) for name in ("missing", "extra", "components", "no_base")},
            **{name: dict(getattr(self, name)) for name in ("versions", "output")},
        }
        return {
            "format": FORMAT,
            "method": self.method,
            "options": dict(self.options),
            **({} if self.weights is None else {"weights": list(self.weights)}),
            "seed": self.seed,
            "save_dtype": self.save_dtype,
            "base": self.base.document(),
            "experts": [expert.document() for expert in self.experts],
            **{
                name: value
                for name, value in more.items()
                if value not in (None, (), [], {}, False, "error")
            },
        }

    def canonical(self) -> str:
        """Return the document as canonical JSON: sorted keys, no white space, no NaN."""
        return json.dumps(
            self.document(),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
            allow_nan=False,
        )

    def metadata(self) -> dict[str, str]:
        """Return what the safetensors file says about itself."""
        spans = [str(e.range) for e in self.experts if e.range]
        ranges = (
            {"modelspec.timestep_range": f"{min(spans)[:4]}-{max(s[5:] for s in spans)}"}
            if spans
            else {}
        )
        return {
            "format": "pt",
            "modelspec.merged_from": ", ".join(
                s.name for s in (*([] if self.no_base else [self.base]), *self.experts)
            ),
            **ranges,
            METADATA: replace(self, output={}).canonical(),
        }


def home_of(weights: Path) -> Path:
    """Return the folder that the recipe in a file of weights is relative to: the whole output's."""
    return next(
        (p for p in (weights.parent, weights.parent.parent) if (p / DOCUMENT).is_file()),
        weights.parent,
    )
