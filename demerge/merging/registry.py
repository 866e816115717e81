"""Which merge methods there are, by name.

`@method` registers a function and returns it unchanged. Other packages register by the entry point group
`demerge.methods`: NAME = a module with such functions, or one function, which without a decorator gets that name. A file
serves without any registration: `path.py:function`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from demerge.errors import InputError, UsageError
from demerge.merging.contract import Block, Blocks, Method, Scope, Statistic, describe

__all__ = [
    "Block",
    "Blocks",
    "Method",
    "Scope",
    "Statistic",
    "all_methods",
    "find",
    "method",
    "of",
]  # what a method's file imports

Function = TypeVar("Function", bound=Callable[..., Tensor])
_METHODS: dict[str, Method] = {}
COMMUNITY = (
    "weighted_sum",
    "add_difference",
)  # which a recipe may ask for, see `demerge.merging.recipe.method_names`


def method(
    name: str,
    *,
    paper: str,
    aliases: Sequence[str] = (),
    statistics: Sequence[Statistic] = (),
    whole: bool | Callable[[Mapping[str, Any]], bool] = False,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    off: Mapping[str, Any] | None = None,
    precise: bool = False,
) -> Callable[[Function], Function]:
    """Register a function as the merge method `name`; the function itself is returned unchanged."""

    def register(function: Function) -> Function:
        if name in _METHODS:
            raise UsageError(
                f"merge method '{name}' is registered twice", fix="rename one of the two"
            )
        described = describe(
            function, name, paper=paper, statistics=statistics, whole=whole is True, off=off
        )
        sometimes = whole if callable(whole) else None
        described = replace(described, aliases=tuple(aliases), presets=presets or {})
        _METHODS[name] = replace(described, whole_with=sometimes, precise=precise)
        return function

    return register


def all_methods() -> dict[str, Method]:
    """Return all methods by name, with those of other packages."""
    _load()
    return dict(sorted(_METHODS.items()))


def find(name: str) -> Method:
    """Return the method of a name, or of `path.py:function`.

    Raises:
        UsageError: where there is none.
    """
    known = all_methods()
    if ".py:" in name:
        return _from_file(name)
    names = {
        folded(alias): method
        for method in known.values()
        for alias in (method.name, *method.aliases)
    }
    if folded(name) in names:
        return names[folded(name)]
    near = get_close_matches(folded(name), [*names, *COMMUNITY], 2, 0.7)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"unknown merge method '{name}'",
        fix=f"{meant}use one of {', '.join(known)}, or path.py:function",
    )


def folded(name: str) -> str:
    """Return a method's name as names are compared: `Weighted Sum` as weighted_sum."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def of(function: Callable[..., Tensor]) -> Method:
    """Return the registered method of a function; one that is not registered is described by its signature alone."""
    registered = (m for m in all_methods().values() if m.function is function)
    return next(registered, None) or describe(function, function.__name__, paper="")


@cache
def _load() -> None:
    importlib.import_module("demerge.merging.methods").import_all()
    for entry in entry_points(group="demerge.methods"):
        try:
            found = entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else entry.module
            what = f"{package} has a merge method that cannot be imported: {entry.value}: {type(error).__name__}: {error}"
            raise InputError(what, fix=f"mend or uninstall {package}") from error
        if inspect.isfunction(found) and all(m.function is not found for m in _METHODS.values()):
            method(entry.name, paper="")(found)


def _from_file(name: str) -> Method:
    path, _, attribute = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"demerge_method_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise InputError(f"{path}: no such Python file", fix="write --method path.py:function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(
            f"{path}: cannot be imported: {type(error).__name__}: {error}", fix="mend the file"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(
            f"{path} has no function '{attribute}'", fix="write --method path.py:function"
        )
    return of(function)
