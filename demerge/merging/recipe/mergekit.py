"""mergekit's YAML as a recipe: its methods by their names there, with the defaults they have there.

    models: [{model: PATH, parameters: {weight: 0.5, density: 0.3}}]     base_model: PATH
    parameters: {normalize: true, lambda: 1.0}   merge_method: ties      dtype: float16

    linear             average of the models alone, or task_arithmetic of them without `normalize`
    task_arithmetic    the same                  slerp         two models alone, weights 1 - t and t
    ties               ties preset=mergekit      model_stock   model_stock, `filter_wise` by row
    dare_linear        dare preset=mergekit then=linear         dare_ties      ... then=ties
    breadcrumbs        breadcrumbs preset=mergekit then=linear  breadcrumbs_ties, della likewise
    sce                sce, density being `select_topk`

Differs from mergekit: slerp is of task vectors (of weights it is nearly the plain mean), and random
masks differ. What has no counterpart is an error that says what to write: numbers that differ from
layer to layer are rules here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from demerge.errors import UsageError
from demerge.storage.documents import check_known_keys, typed

MARK = "merge_method"
KEYS = (MARK, "models", "base_model", "parameters", "dtype", "out_dtype")
DTYPES = ("float32", "float16", "bfloat16")
LINEAR, TIES = {"preset": "mergekit", "then": "linear"}, {"preset": "mergekit", "then": "ties"}
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "linear": ("average", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "slerp": ("slerp", {}),
    "model_stock": ("model_stock", {}),
    "sce": ("sce", {"density": 1.0}),
    "ties": ("ties", {"preset": "mergekit", "density": 1.0}),
    "dare_linear": ("dare", LINEAR | {"density": 1.0}),
    "dare_ties": ("dare", TIES | {"density": 1.0}),
    "breadcrumbs": ("breadcrumbs", LINEAR | {"density": 1.0}),
    "breadcrumbs_ties": ("breadcrumbs", TIES | {"density": 1.0}),
    "della_linear": ("della", LINEAR | {"density": 1.0, "epsilon": 0.15}),
    "della": ("della", TIES | {"density": 1.0, "epsilon": 0.15}),
}
WITHOUT_DENSITY = ("linear", "task_arithmetic", "slerp", "model_stock")
NORMALIZED = ("linear", "ties", "della")  # by default
SHARED = {
    "density": "density",
    "select_topk": "density",
    "gamma": "gamma",
    "epsilon": "epsilon",
    "lambda": "scale",
}
EXAMPLES = dict.fromkeys(("normalize", "rescale", "filter_wise", "int8_mask"), "true")
OTHERS = ("weight", "normalize", "rescale", "t", "filter_wise", "int8_mask")
Models = list[tuple[str, dict[str, Any]]]  # (path, parameters)


def from_mergekit(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return our document for one of mergekit; `where` names its file.

    Raises:
        UsageError: if something in it has no counterpart, with what to write instead.
    """
    for key in ("slices", "modules"):
        if key in document:
            fix = "write models: [...], and what differs between layers as rules: ['up scale=0.5']"
            what = f"{where}: {key} of mergekit join layers, which denoisers cannot"
            raise UsageError(what, fix=fix)
    check_known_keys(document, KEYS, f"{where} (mergekit's)")
    name = str(document[MARK])[:80]
    if name not in METHODS:
        what = f"{where}: mergekit's method '{name}' does not exist here"
        raise UsageError(what, fix=f"use one of {', '.join(METHODS)}")
    base = typed(document, "base_model", str, where)
    models = [_read_model(entry, where) for entry in typed(document, "models", list, where) or []]
    shared = _check_parameters(typed(document, "parameters", dict, where) or {}, where)
    is_alone = name in ("linear", "slerp")
    if name == "slerp":
        models = _read_slerp(models, base, shared, where)
    elif not is_alone:
        models = [(path, parameters) for path, parameters in models if path != base]
        if base is None:
            raise UsageError(f"{where}: {name} needs a base_model", fix="write base_model: PATH")
    method, options, weights = _read_method(name, models, shared, where)
    recipe: dict[str, Any] = {"no_base": True} if is_alone else {"base": base}
    recipe |= {"experts": [path for path, _ in models], "method": method, "options": options}
    if weights:
        recipe["weights"] = weights
    dtype = document.get("out_dtype") or document.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        fix = f"write one of {', '.join(DTYPES)}"
        raise UsageError(f"{where}: dtype {dtype!r} cannot be stored", fix=fix)
    return recipe | ({"save_dtype": dtype} if dtype else {})


def _read_method(
    name: str, models: Models, shared: Mapping[str, Any], where: str
) -> tuple[str, dict[str, Any], list[float] | None]:
    """Return our method, its options and the weights."""
    method, defaults = METHODS[name]
    options = {**defaults, **_read_options(models, shared, where)}
    if name in WITHOUT_DENSITY and options.get("density") == 1:
        del options["density"]  # all is kept anyway
    weights = _read_weights(name, models, shared, where)
    normalize = bool(shared.get("normalize", name in NORMALIZED))
    if name == "linear" and not normalize:
        method = "task_arithmetic"
    if weights and normalize and (name == "task_arithmetic" or options.get("then") == "linear"):
        weights = [weight / (sum(weights) or 1.0) for weight in weights]
    if options.get("then") == "ties" or name == "ties":
        options["mean"] = "weights" if normalize else "none"
    if shared.get("rescale") is False and method in ("dare", "della"):
        options["rescale"] = "none"
    if shared.get("rescale") is True and method == "breadcrumbs":
        options["rescale"] = "l1"
    if shared.get("filter_wise") is True:
        options["by"] = "row"
    return method, options, weights


def _read_model(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        fix = "write {model: PATH, parameters: {weight: 0.5}}"
        raise UsageError(f"{where}: a model names no path", fix=fix)
    check_known_keys(entry, ("model", "parameters"), f"{where}: model {entry['model']}")
    parameters = typed(entry, "parameters", dict, where) or {}
    return entry["model"], _check_parameters(parameters, where)


def _check_parameters(parameters: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return parameters that are one number or one truth each."""
    check_known_keys(parameters, (*SHARED, *OTHERS), f"{where}: parameters")
    for key, value in parameters.items():
        what = f"{where}: {key} is {str(value)[:60]}"
        if isinstance(value, list | dict):
            fix = "give one number, and write the rest as rules, for example"
            fix = f"{fix} rules: ['up.attn weights=0.2..0.8,0.5 density=0.3']"
            raise UsageError(f"{what}, which differs from layer to layer", fix=fix)
        if not isinstance(value, int | float):
            what = f"{what}, not a number, true or false"
            raise UsageError(what, fix=f"write for example {key}: {EXAMPLES.get(key, 0.5)}")
    return dict(parameters)


def _read_slerp(models: Models, base: str | None, shared: Mapping[str, Any], where: str) -> Models:
    """Return the two models of a slerp with their weights, that of t = 0 first."""
    paths = [base] if base else []
    paths += [path for path, _ in models if path != base]
    if len(paths) != 2 or "t" not in shared:
        fix = "write base_model, one more model and parameters: {t: 0.5}"
        raise UsageError(f"{where}: slerp needs two models and a t", fix=fix)
    return [(paths[0], {"weight": 1 - shared["t"]}), (paths[1], {"weight": shared["t"]})]


def _read_options(models: Models, shared: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the options that all models share."""
    options = {SHARED[key]: value for key, value in shared.items() if key in SHARED}
    for key, option in SHARED.items():
        values = {parameters.get(key, shared.get(key)) for _, parameters in models}
        if len(values) > 1:
            what = f"{where}: {key} differs between models ({', '.join(map(str, values))})"
            raise UsageError(what, fix=f"give all models one {key}")
        if values and (value := values.pop()) is not None:
            options[option] = value
    return options


def _read_weights(
    name: str, models: Models, shared: Mapping[str, Any], where: str
) -> list[float] | None:
    if name in ("model_stock", "sce"):
        return None
    weights = []
    for path, parameters in models:
        weight = parameters.get("weight", shared.get("weight"))
        if weight is None:
            fix = "write parameters: {weight: 0.5} for each model"
            raise UsageError(f"{where}: {path} has no weight", fix=fix)
        weights.append(float(weight))
    return weights
