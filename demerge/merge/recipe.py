"""How a merged model came about: the recipe, as canonical JSON, safetensors metadata and a model card.

The recipe names every input with the SHA-256 of its files, the method with all its options, the seed and the versions.
It holds no clock and no machine: the same inputs and versions make the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from demerge.timesteps import TimestepRange

FORMAT = "demerge.recipe/1"


@dataclass(frozen=True, slots=True)
class Source:
    """An input: the path as given, the SHA-256 of each file, and for an expert the range it was trained on.

    `inputs` are the files a method needs beside the weights, hashed as well.
    """

    path: str
    files: Mapping[str, str]
    range: TimestepRange | None = None
    inputs: Mapping[str, Mapping[str, str]] | None = None

    @property
    def name(self) -> str:
        """The last parts of the path, enough to tell experts apart."""
        parts = [p for p in re.split(r"[/\\]", self.path) if p not in ("", ".", "..")]
        return "/".join(parts[-2:]) or self.path

    def document(self) -> dict[str, Any]:
        """Return the source as JSON values."""
        span = {"range": [self.range.start, self.range.stop]} if self.range else {}
        inputs = {"inputs": {k: dict(v) for k, v in self.inputs.items()}} if self.inputs else {}
        return {"path": self.path, "files": dict(self.files), **span, **inputs}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What was merged, and how."""

    method: str
    options: Mapping[str, Any]
    weights: Sequence[float]
    seed: int
    save_dtype: str
    base: Source
    experts: Sequence[Source]

    def document(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return {
            "format": FORMAT,
            "method": self.method,
            "options": dict(self.options),
            "weights": list(self.weights),
            "seed": self.seed,
            "save_dtype": self.save_dtype,
            "base": self.base.document(),
            "experts": [expert.document() for expert in self.experts],
            "versions": {name: installed(name) for name in ("demerge", "numpy", "torch")},
        }

    def canonical(self) -> str:
        """Return the document as canonical JSON: sorted keys, no white space, no NaN."""
        return json.dumps(self.document(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    def metadata(self) -> dict[str, str]:
        """Return what the safetensors file says about itself."""
        spans = [str(e.range) for e in self.experts if e.range]
        ranges = {"modelspec.timestep_range": f"{min(spans)[:4]}-{max(s[5:] for s in spans)}"} if spans else {}
        return {
            "format": "pt",
            "modelspec.merged_from": ", ".join(s.name for s in (self.base, *self.experts)),
            **ranges,
            "demerge.recipe": self.canonical(),
        }


def card(recipe: Recipe, base_model: str, survived: float) -> str:
    """Return the model card: Markdown with the Hub's front matter, every name escaped."""
    head = {
        "base_model": base_model,
        "base_model_relation": "merge",
        "library_name": "diffusers",
        "tags": ["demerge", "diffusion", "merge"],
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    rows = "\n".join(
        f"| {escaped(e.name)} | {e.range or '-'} | {w:g} | `{next(iter(e.files.values()))[:12]}` |"
        for e, w in zip(recipe.experts, recipe.weights, strict=True)
    )
    options = ", ".join(f"{name}={value}" for name, value in recipe.options.items()) or "none"
    return f"""---
{front}
---

# {escaped(base_model)}, merged by {escaped(recipe.method)}

One diffusion model out of a base and {len(recipe.experts)} models finetuned from it. It has the base's architecture and
loads with stock diffusers.

| expert | timesteps | weight | sha256 |
|---|---|---|---|
{rows}

| | |
|---|---|
| method | {escaped(recipe.method)} |
| options | {escaped(options)} |
| seed | {recipe.seed} |
| dtype | {recipe.save_dtype} |
| share of the merged changes that survive the dtype | {survived:.1%} |

Made by demerge {installed("demerge")}; `demerge.json` holds the whole recipe, with the hash of every input.
"""


def escaped(text: str) -> str:
    """Return text that Markdown and HTML show as it is, on one line."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#|!&])", lambda m: f"&#{ord(m[1])};", flat)


def installed(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
