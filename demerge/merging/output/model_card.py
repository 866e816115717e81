"""The model card of a merge: Markdown with the Hub's front matter, every name escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from demerge.merging.recipe.recipe import Recipe

SHOWN = 20  # rules
Row = Sequence[object]


def render_card(
    recipe: Recipe, base_model: str, share: float, rounding: str = "", notes: Sequence[str] = ()
) -> str:
    """Return the card of a finished merge.

    Args:
        share: of the changed entries that survive the rounding.
        rounding: how the numbers are stored, if that is not plain.
        notes: what of base and experts was dropped, or kept from the base.
    """
    rank, K = recipe.lora_rank, len(recipe.experts)
    head = {
        "base_model": base_model,
        "base_model_relation": "merge",
        "library_name": "diffusers",
        "tags": ["demerge", "diffusion", "merge", *(["lora"] if rank else [])],
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    experts: list[Row] = []
    weights = ["equal"] * K if recipe.weights is None else [f"{w:g}" for w in recipe.weights]
    for expert, weight in zip(recipe.experts, weights, strict=True):
        sha = next(iter(expert.files.values()))[:12]
        experts.append([escape(expert.name), expert.range or "-", weight, f"`{sha}`"])
    kind = f"An adapter of rank {rank}" if rank else "One diffusion model"
    fits = "It has the base's architecture and loads with stock diffusers"
    fits = "It fits the base" if rank else fits
    models = f"a base and {K} models finetuned from it"
    models = f"{K} models, without a base" if recipe.no_base else models
    facts = _list_facts(recipe, share)
    if rounding:
        facts.append(["stored", escape(rounding)])
    lines = "".join(f"- {escape(note)}\n" for note in notes) + ("\n" if notes else "")
    lines += f"Made by demerge {recipe.versions.get('demerge', '')}; "
    return f"""---
{front}
---

# {escape(base_model)}, merged by {escape(recipe.method)}

{kind} out of {models}. {fits}.

{render_table(["expert", "timesteps", "weight", "sha256"], experts)}

{render_table(["", ""], facts)}

{lines}`demerge.json` holds the whole recipe, with the hash of every input.
"""


def _list_facts(recipe: Recipe, share: float) -> list[Row]:
    options = ", ".join(f"{name}={value}" for name, value in recipe.options.items()) or "none"
    facts: list[Row] = [["method", escape(recipe.method)], ["options", escape(options)]]
    facts += [["rule", escape(str(rule))] for rule in recipe.rules[:SHOWN]]
    if len(recipe.rules) > SHOWN:
        facts.append(["more rules", len(recipe.rules) - SHOWN])
    if recipe.only:
        facts.append(["merged, the rest is the base's", escape(", ".join(recipe.only))])
    return [
        *facts,
        ["seed", recipe.seed],
        ["dtype", recipe.save_dtype],
        ["share of the merged changes that survive the dtype", f"{share:.1%}"],
    ]


def render_table(head: Sequence[str], rows: Sequence[Row]) -> str:
    """Return a Markdown table."""
    text = ""
    for row in (head, ["---"] * len(head), *rows):
        text += "|" + "|".join(f" {cell} " if cell != "" else " " for cell in row) + "|\n"
    return text.rstrip("\n")


def escape(text: str) -> str:
    """Return text that Markdown and HTML show as it is, on one line."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#|!&])", lambda m: f"&#{ord(m[1])};", plain)
