"""The names that other programs give to methods, and what they are here.

    weighted_sum      A + m (B - A)     task_arithmetic of A and B, weight m (`multiplier`, `alpha`)
    add_difference    A + m (B - C)     task_arithmetic of A, B and C, weights m and -m
    dare_ties         dare then=ties    dare_linear, della_linear, breadcrumbs_ties likewise

m is 0.5 for weighted_sum and 1 for add_difference. Case, hyphens and spaces do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from demerge.errors import UsageError
from demerge.merging.recipe.recipe import Recipe
from demerge.merging.registry import normalize_name

# name -> default of m, the sign of m for each expert, the models
DIFFERENCES: Mapping[str, tuple[float, tuple[float, ...], str]] = {
    "weighted_sum": (0.5, (1.0,), "A B"),
    "add_difference": (1.0, (1.0, -1.0), "A B C"),
}
STAGES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dare_linear": ("dare", {"then": "linear"}),
    "dare_ties": ("dare", {"then": "ties"}),
    "della_linear": ("della", {"then": "linear"}),
    "breadcrumbs_ties": ("breadcrumbs", {"then": "ties"}),
}
MULTIPLIERS = ("multiplier", "alpha", "m")
EXAMPLE = "for example --option multiplier=0.5"


def translate(recipe: Recipe) -> Recipe:
    """Return a recipe with a method of demerge in place of another program's.

    Raises:
        UsageError: if the number of models or an option does not suit the method.
    """
    name = normalize_name(recipe.method)
    if name in STAGES:
        method, options = STAGES[name]
        return replace(recipe, method=method, options={**options, **recipe.options})
    if name not in DIFFERENCES:
        return recipe
    default, signs, models = DIFFERENCES[name]
    if len(recipe.experts) != len(signs) or recipe.no_base:
        fix = f"demerge merge {models} --method {name} --option multiplier=0.5"
        raise UsageError(f"{name} takes the models {models}", fix=fix)
    unknown = [option for option in recipe.options if option not in MULTIPLIERS]
    if unknown:
        what = f"method {name} has no option '{unknown[0]}'"
        raise UsageError(what, fix=f"its option: multiplier={default}")
    m = next(iter(recipe.options.values()), default)
    if recipe.weights is not None:
        if len(recipe.weights) != 1:
            raise UsageError(f"{name} takes one weight, the multiplier", fix=EXAMPLE)
        m = recipe.weights[0]
    try:
        weights = [sign * float(m) for sign in signs]
    except (TypeError, ValueError) as error:
        raise UsageError(f"multiplier={m} is not a number", fix=EXAMPLE) from error
    return replace(recipe, method="task_arithmetic", options={}, weights=weights)
