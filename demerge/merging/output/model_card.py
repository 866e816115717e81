"""The model card of a merge: Markdown with the Hub's front matter, every name escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from demerge.merging.recipe.recipe import Recipe


def card(
    recipe: Recipe, base_model: str, survived: float, rounding: str = "", notes: Sequence[str] = ()
) -> str:
    """Return the card of a finished merge.

    Args:
        survived: the share of the changed entries that outlives the rounding.
        rounding: how the numbers are stored, if that is not plain.
        notes: what of base and experts was left out, or kept from the base.
    """
    head = {
        "base_model": base_model,
        "base_model_relation": "merge",
        "library_name": "diffusers",
        "tags": ["demerge", "diffusion", "merge", *(["lora"] if recipe.out_rank else [])],
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    weights = (
        ["equal"] * len(recipe.experts)
        if recipe.weights is None
        else [f"{w:g}" for w in recipe.weights]
    )
    experts = [
        [escaped(e.name), e.range or "-", w, f"`{next(iter(e.files.values()))[:12]}`"]
        for e, w in zip(recipe.experts, weights, strict=True)
    ]
    kind = f"an adapter of rank {recipe.out_rank}" if recipe.out_rank else "one diffusion model"
    fits = (
        "It fits the base"
        if recipe.out_rank
        else "It has the base's architecture and loads with stock diffusers"
    )
    told = "".join([*(f"- {escaped(note)}\n" for note in notes), "\n" if notes else ""])
    models = f"a base and {len(recipe.experts)} models finetuned from it"
    models = f"{len(recipe.experts)} models, without a base" if recipe.no_base else models
    return f"""---
{front}
---

# {escaped(base_model)}, merged by {escaped(recipe.method)}

{kind.capitalize()} out of {models}. {fits}.

{_table(["expert", "timesteps", "weight", "sha256"], experts)}

{_table(["", ""], [*_facts(recipe, survived), *([["stored", escaped(rounding)]] if rounding else [])])}

{told}Made by demerge {recipe.versions.get("demerge", "")}; `demerge.json` holds the whole recipe, with the hash of every input.
"""


def _facts(recipe: Recipe, survived: float) -> list[list[object]]:
    options = ", ".join(f"{name}={value}" for name, value in recipe.options.items()) or "none"
    rules: list[list[object]] = [["rule", escaped(str(rule))] for rule in recipe.rules[:20]]
    more: list[list[object]] = (
        [["more rules", len(recipe.rules) - 20]] if len(recipe.rules) > 20 else []
    )
    only: list[list[object]] = (
        [["merged, the rest is the base's", escaped(", ".join(recipe.only))]] if recipe.only else []
    )
    return [
        ["method", escaped(recipe.method)],
        ["options", escaped(options)],
        *rules,
        *more,
        *only,
        ["seed", recipe.seed],
        ["dtype", recipe.save_dtype],
        ["share of the merged changes that survive the dtype", f"{survived:.1%}"],
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "|" + "|".join(f" {cell} " if cell != "" else " " for cell in line) + "|" for line in lines
    )


def escaped(text: str) -> str:
    """Return text that Markdown and HTML show as it is, on one line."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#|!&])", lambda m: f"&#{ord(m[1])};", flat)
