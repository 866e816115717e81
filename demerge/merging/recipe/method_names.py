"""The names that other programs give to methods, and what they are here.

    weighted_sum      A + m (B - A)        task_arithmetic of A and B, weight m (`multiplier` or `alpha`, 0.5)
    add_difference    A + m (B - C)        task_arithmetic of A, B and C, weights m and -m (1)
    dare_ties         dare then=ties       dare_linear, della_linear, breadcrumbs_ties likewise

Case, hyphens and spaces do not matter: `Weighted Sum` is weighted_sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from demerge.errors import UsageError
from demerge.merging.recipe.recipe import Recipe
from demerge.merging.registry import normalize_name

DIFFERENCES: Mapping[
    str, tuple[float, tuple[float, ...], str]
] = {  # the default of m, what it multiplies, the models
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


def translated(recipe: Recipe) -> Recipe:
    """Return a recipe with a method of ours in the place of another program's.

    Raises:
        UsageError: if it has not as many models as the method takes, or an option that it has not.
    """
    name = normalize_name(recipe.method)
    if name in STAGES:
        method, options = STAGES[name]
        return replace(recipe, method=method, options={**options, **recipe.options})
    if name not in DIFFERENCES:
        return recipe
    default, signs, models = DIFFERENCES[name]
    if len(recipe.experts) != len(signs) or recipe.no_base:
        raise UsageError(
            f"{name} takes the models {models}",
            fix=f"demerge merge {models} --method {name} --option multiplier=0.5",
        )
    unknown = [option for option in recipe.options if option not in MULTIPLIERS]
    if unknown:
        raise UsageError(
            f"method {name} has no option '{unknown[0]}'", fix=f"its option: multiplier={default}"
        )
    m = next(iter(recipe.options.values()), default)
    if recipe.weights is not None:
        if len(recipe.weights) != 1:
            raise UsageError(
                f"{name} takes one weight, the multiplier",
                fix="for example --option multiplier=0.5",
            )
        m = recipe.weights[0]
    try:
        weights = [sign * float(m) for sign in signs]
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"multiplier={m} is not a number", fix="for example --option multiplier=0.5"
        ) from error
    return replace(recipe, method="task_arithmetic", options={}, weights=weights)
