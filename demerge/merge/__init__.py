"""Merging: methods as pure functions, streamed over files; each result carries the recipe that made it.

`registry` what a method is, `options` what it may be asked, `apply` the engine, `plan` files in and files out, `checks`
and `sources` what goes in, `output` the writing, `recipe` how a merge came about; then one paper per file: `linear`,
`ties`, `dare`, `fisher`.
"""

from demerge.merge import dare, fisher, linear, ties
from demerge.merge.apply import Merge, merge_tensors
from demerge.merge.options import Between
from demerge.merge.plan import MergeResult, Plan, merge, prepare
from demerge.merge.recipe import Recipe
from demerge.merge.registry import Block, Method, Statistic, find, method, methods

__all__ = [
    "Between",
    "Block",
    "Merge",
    "MergeResult",
    "Method",
    "Plan",
    "Recipe",
    "Statistic",
    "dare",
    "find",
    "fisher",
    "linear",
    "merge",
    "merge_tensors",
    "method",
    "methods",
    "prepare",
    "ties",
]
