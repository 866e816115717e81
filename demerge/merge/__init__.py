"""Merging: methods as pure functions, streamed over files; each result carries the recipe that made it.

papers/    one merge method per file; `contract` what a method is, `options` what it may be asked, `registry` all by name
recipe/    what is asked of a merge, and for which tensors
engine     `apply` the merge, `tensors` of state dicts, `stream` its chunks, `workers` that share them, `checks` what must hold,
           `probe` what a merge comes to
files      `preparation` everything found and checked, `plan` and `parts` what comes out, `output` and `adapter` how it is
           written, `sources`, `schedule` and `denoisers` what lies around the weights, `verification` the same once more
beside     `diagnose` and `report` what a merge did; `session` and `resident` merges in memory, again and again
"""

from demerge.merge.apply import Merge
from demerge.merge.contract import Block, Method, Statistic
from demerge.merge.options import Between
from demerge.merge.plan import MergeResult, Plan
from demerge.merge.preparation import merge, prepare
from demerge.merge.recipe.recipe import Recipe
from demerge.merge.recipe.rules import Rule
from demerge.merge.registry import find, method, methods
from demerge.merge.session import MergeSession
from demerge.merge.tensors import merge_tensors
from demerge.merge.verification import verify

__all__ = [
    "Between",
    "Block",
    "Merge",
    "MergeResult",
    "MergeSession",
    "Method",
    "Plan",
    "Recipe",
    "Rule",
    "Statistic",
    "find",
    "merge",
    "merge_tensors",
    "method",
    "methods",
    "prepare",
    "verify",
]
