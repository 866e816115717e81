"""Merging: methods as pure functions, streamed over files; each result carries the recipe that made it.

papers/    one merge method per file; `contract` what a method is, `options` what it may be asked, `registry` all by name
recipe/    what is asked of a merge, and for which tensors
engine     `apply` the merge, `tensors` of state dicts, `stream` its chunks, `workers` that share them, `checks` what must hold,
           `probe` what a merge comes to
files      `preparation` everything found and checked, `plan` and `parts` what comes out, `output` and `adapter` how it is
           written, `sources`, `schedule` and `denoisers` what lies around the weights, `verification` the same once more
beside     `diagnose` and `report` what a merge did; `session` and `resident` merges in memory, again and again
"""

from demerge.merging.contract import Block, Method, Statistic
from demerge.merging.engine.in_memory import merge_tensors
from demerge.merging.engine.job import Execution, MergeJob
from demerge.merging.method_options import Between
from demerge.merging.plan import MergeResult, Plan
from demerge.merging.planning import merge, prepare
from demerge.merging.recipe.recipe import Recipe
from demerge.merging.recipe.rules import Rule
from demerge.merging.registry import all_methods, find_method, method
from demerge.merging.session import MergeSession
from demerge.merging.verification import verify

__all__ = [
    "Between",
    "Block",
    "Execution",
    "MergeJob",
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
    "prepare",
    "verify",
]
