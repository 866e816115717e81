"""Merging: methods as pure functions, streamed over files; each result carries its recipe.

methods/   one paper per file; `contract` says what a method is, `registry` finds it by name
recipe/    what is merged and how: the value, its files, rules for some tensors
inputs/    experts, their denoisers and other parts, whether they fit the base, statistics
engine/    the arithmetic: a merge as a stream of chunks, shared by processes, in memory too
output/    files of weights, a LoRA, a model card
report/    what a merge did, as numbers and as a page

A merge goes `options` -> `recipe` -> `planning` -> `stage` (plan, run, result) -> `output`.
`verification` repeats it; `session` merges in memory again and again. `blocks` names the parts of
model families.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from demerge.lazy import lazily

if TYPE_CHECKING:
    from demerge.merging.contract import Block, Method, Statistic
    from demerge.merging.engine.in_memory import merge_tensors
    from demerge.merging.engine.job import Execution, MergeJob
    from demerge.merging.method_options import Between
    from demerge.merging.options import MergeInputs, MergeOptions
    from demerge.merging.planning import merge, plan
    from demerge.merging.recipe.recipe import Recipe
    from demerge.merging.recipe.rules import Rule
    from demerge.merging.registry import all_methods, find_method, method
    from demerge.merging.session import MergeSession
    from demerge.merging.stage import MergeResult, Plan
    from demerge.merging.verification import verify

HOMES = {
    "Between": "method_options",
    "Block": "contract",
    "Execution": "engine.job",
    "MergeInputs": "options",
    "MergeJob": "engine.job",
    "MergeOptions": "options",
    "MergeResult": "stage",
    "MergeSession": "session",
    "Method": "contract",
    "Plan": "stage",
    "Recipe": "recipe.recipe",
    "Rule": "recipe.rules",
    "Statistic": "contract",
    "all_methods": "registry",
    "find_method": "registry",
    "merge": "planning",
    "merge_tensors": "engine.in_memory",
    "method": "registry",
    "plan": "planning",
    "verify": "verification",
}

__all__ = [
    "Between",
    "Block",
    "Execution",
    "MergeInputs",
    "MergeJob",
    "MergeOptions",
    "MergeResult",
    "MergeSession",
    "Method",
    "Plan",
    "Recipe",
    "Rule",
    "Statistic",
    "all_methods",
    "find_method",
    "merge",
    "merge_tensors",
    "method",
    "plan",
    "verify",
]
__getattr__, __dir__ = lazily(__name__, HOMES)
