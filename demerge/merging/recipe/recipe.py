"""What is merged and how, as canonical JSON once the inputs are known.

    base: ./base                 # a path, relative to the recipe's folder, or a Hub id
    experts:
      - {path: ./expert-0, weight: 0.5, range: [0, 500]}
      - {path: ./expert-1, weight: 0.5, range: [500, 1000]}
    method: ties                 # this and the rest is optional
    options: {density: 0.2}
    rules: ["up weights=0.2..0.8,0.5", {match: mid, options: {density: 0.5}}]
    only: [down, mid, up]
    seed: 0
    save_dtype: keep
    no_base: false               # true: merge the experts alone

A finished merge holds its recipe three times: in `demerge.json`, in the metadata of the weights,
and, for people, in the model card. It then names the SHA-256 of every input file, all options, and
the versions. It holds no clock and no machine: the same inputs and versions make the same bytes.
`output` is the SHA-256 of the weights, in `demerge.json` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from demerge.errors import InputError, UsageError
from demerge.expert import SPEC_RANGE
from demerge.merging.options import MergeOptions, parse_weights
from demerge.merging.recipe.mergekit import MARK, from_mergekit
from demerge.merging.recipe.reading import FORMAT, read_fields
from demerge.merging.recipe.rules import Rule
from demerge.merging.recipe.source import Source, expand_path
from demerge.merging.recipe.weight_files import check_order, read_weight_file
from demerge.storage.documents import read_document
from demerge.storage.safetensors_header import read_header
from demerge.timesteps import TimestepRange

METADATA = "demerge.recipe"
DOCUMENT = "demerge.json"
Ranges = Sequence[TimestepRange | str | None]
WITHOUT_DEFAULTS: tuple[Any, ...] = (
    "rules", "only", "variant", "out_rank", "lora_format", "boundary", "skip_text_encoder",
    "missing", "extra", "components", "no_base", "versions", "output",
)  # fmt: skip
DEFAULTS: tuple[Any, ...] = (None, (), [], {}, False, "error", "auto")


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe(MergeOptions):
    """A merge: the models, and the options of `MergeOptions`.

    Attributes:
        versions: of the packages that made the merge.
        output: the SHA-256 of each file of weights.

    Raises:
        UsageError: if an option breaks its rule.
    """

    base: Source
    experts: Sequence[Source]
    weights: Sequence[float] | None = None
    rules: Sequence[Rule] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    output: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        experts = [expert.path for expert in self.experts]
        return f"Recipe({self.method}: {self.base.path!r}, experts {experts})"

    @property
    def is_pair_alone(self) -> bool:
        """Whether it merges one model without a base: the two denoisers of a pipeline into one."""
        return self.no_base and len(self.experts) == 1

    @classmethod
    def of(
        cls,
        base: str | Path,
        experts: Sequence[str | Path],
        *,
        ranges: Ranges | None = None,
        **options: Any,
    ) -> Recipe:
        """Return the recipe for a base and its experts, with `options` of `MergeOptions`.

        Args:
            experts: models, LoRA files, or folders of `demerge finetune`.
            ranges: the timesteps of each expert, if its record does not name them.

        Raises:
            UsageError: if a rule cannot be read, or there is not one range per expert.
        """
        paths = [path for expert in experts for path in expand_path(str(expert))]
        recipe = cls(base=Source(str(base)), experts=[Source(path) for path in paths])
        return recipe.changed(ranges=ranges, **options)

    def changed(self, *, ranges: Ranges | None = None, **options: Any) -> Recipe:
        """Return the recipe with other options; those of the method are added to the present ones.

        With `no_base` the base becomes the first expert. It raises as `of` does.
        """
        experts = list(self.experts)
        weights = options.get("weights")
        if isinstance(weights, str):
            weights = options["weights"] = parse_weights(weights)
        rules = list(options.get("rules", self.rules))
        if isinstance(weights, Path):
            check_order(weights, [expert.path for expert in experts])
            options["weights"], weight_rules = read_weight_file(weights)
            rules = [*options.get("rules", ()), *weight_rules]
        if options.get("no_base") and not self.no_base:
            experts = [self.base, *experts]
        if ranges and len(ranges) != len(experts):
            what = f"{len(ranges)} ranges for {len(experts)} experts"
            raise UsageError(what, fix="give --range once for each expert")
        for i, span in enumerate(ranges or ()):
            experts[i] = replace(experts[i], range=_parse_range(span))
        options["rules"] = [rule if isinstance(rule, Rule) else Rule.parse(rule) for rule in rules]
        options["options"] = {**self.options, **(options.get("options") or {})}
        return replace(self, experts=experts, **options)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe: YAML, JSON, a merged .safetensors file, or a folder with demerge.json.

        Raises:
            InputError: if the file is missing, damaged or holds no recipe.
            UsageError: if a key is unknown or a value wrong.
        """
        path = Path(path)
        path = path / DOCUMENT if path.is_dir() else path
        is_merged = path.suffix == ".safetensors"
        document = _read_metadata(path) if is_merged else read_document(path)
        if isinstance(document, dict) and MARK in document:
            document = from_mergekit(document, str(path))
        folder = find_home(path) if is_merged else path.parent
        return cls(**read_fields(document, folder, str(path)))

    def relative_to(self, folder: Path) -> Recipe:
        """Return the recipe as it is written in `folder`, with paths relative to it."""
        experts = [expert.relative_to(folder) for expert in self.experts]
        return replace(self, base=self.base.relative_to(folder), experts=experts)

    def document(self) -> dict[str, Any]:
        """Return the recipe as JSON values; most options are left out at their default."""
        document: dict[str, Any] = {
            "format": FORMAT,
            "method": self.method,
            "options": dict(self.options),
            "seed": self.seed,
            "save_dtype": self.save_dtype,
            "base": self.base.document(),
            "experts": [expert.document() for expert in self.experts],
        }
        if self.weights is not None:
            document["weights"] = list(self.weights)
        values = {**vars(self), "out_rank": self.lora_rank}
        values["rules"] = [rule.document() for rule in self.rules]
        more = {name: values[name] for name in WITHOUT_DEFAULTS if values[name] not in DEFAULTS}
        return document | more

    def canonical(self) -> str:
        """Return the document as canonical JSON: sorted keys, no white space, no NaN."""
        form: dict[str, Any] = {"sort_keys": True, "separators": (",", ":")}
        return json.dumps(self.document(), **form, ensure_ascii=False, allow_nan=False)

    def metadata(self) -> dict[str, str]:
        """Return what the safetensors file says about itself."""
        models = [*([] if self.no_base else [self.base]), *self.experts]
        metadata = {
            "format": "pt",
            "modelspec.merged_from": ", ".join(model.name for model in models),
            METADATA: replace(self, output={}).canonical(),
        }
        spans = [expert.range for expert in self.experts if expert.range]
        if spans:
            start, stop = min(span.start for span in spans), max(span.stop for span in spans)
            metadata[SPEC_RANGE] = f"{start},{stop}"
        return metadata


def find_home(weights: Path) -> Path:
    """Return the folder that the recipe in a file of weights is relative to: the output's."""
    folders = (weights.parent, weights.parent.parent)
    return next((folder for folder in folders if (folder / DOCUMENT).is_file()), weights.parent)


def _read_metadata(path: Path) -> Any:
    text = read_header(path).metadata.get(METADATA)
    if text is None:
        raise InputError(f"{path} holds no recipe", fix="name a model that demerge merged")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what = f"{path}: its recipe is damaged: {str(error)[:80]}"
        raise InputError(what, fix="use demerge.json") from error


def _parse_range(span: TimestepRange | str | None) -> TimestepRange | None:
    if not isinstance(span, str):
        return span
    return None if span == "none" else TimestepRange.parse(span)
