"""The merge methods by name.

`@method` registers a function and returns it unchanged. Other packages register by the entry point
group `demerge.methods`: NAME = a module with such functions, or one function, which gets that name.
A file needs no registration: `--method path.py:function`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar, Unpack

from torch import Tensor

from demerge.errors import InputError, UsageError
from demerge.merging.contract import (
    Block,
    Blocks,
    Method,
    MethodFields,
    Scope,
    Statistic,
    describe_method,
)

__all__ = [  # what a method's file imports, and how methods are found
    "Block",
    "Blocks",
    "Method",
    "Scope",
    "Statistic",
    "all_methods",
    "find_method",
    "method",
    "method_of",
]

Function = TypeVar("Function", bound=Callable[..., Tensor])
_METHODS: dict[str, Method] = {}
COMMUNITY = ("weighted_sum", "add_difference")  # names of `recipe.foreign_names`, for suggestions
FILE_FIX = "write --method path.py:function"


def method(
    name: str, *, paper: str, **fields: Unpack[MethodFields]
) -> Callable[[Function], Function]:
    """Register a function as the merge method `name`; the function itself is returned unchanged."""

    def register(function: Function) -> Function:
        if name in _METHODS:
            what = f"merge method '{name}' is registered twice"
            raise UsageError(what, fix="rename one of the two")
        _METHODS[name] = describe_method(function, name, paper=paper, **fields)
        return function

    return register


def all_methods() -> dict[str, Method]:
    """Return all methods by name, with those of other packages."""
    _load()
    return dict(sorted(_METHODS.items()))


def find_method(name: str) -> Method:
    """Return the method of a name, or of `path.py:function`.

    Raises:
        UsageError: if no method has this name.
        InputError: if the file does not exist or fails.
    """
    known = all_methods()
    if ".py:" in name:
        return _from_file(name)
    by_name: dict[str, Method] = {}
    for each in known.values():
        by_name |= dict.fromkeys(map(normalize_name, (each.name, *each.aliases)), each)
    wanted = normalize_name(name)
    if wanted in by_name:
        return by_name[wanted]
    near = get_close_matches(wanted, [*by_name, *COMMUNITY], 2, 0.7)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    fix = f"{hint}use one of {', '.join(known)}, or path.py:function"
    raise UsageError(f"unknown merge method '{name}'", fix=fix)


def normalize_name(name: str) -> str:
    """Return a method's name as names are compared: `Weighted Sum` as weighted_sum."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def method_of(function: Callable[..., Tensor]) -> Method:
    """Return the registered method of a function, or what its signature alone describes."""
    registered = (m for m in all_methods().values() if m.function is function)
    return next(registered, None) or describe_method(function, function.__name__)


@cache
def _load() -> None:
    importlib.import_module("demerge.merging.methods").import_all()
    for entry in entry_points(group="demerge.methods"):
        try:
            found = entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else entry.module
            why = f"{entry.value}: {type(error).__name__}: {error}"
            what = f"{package} has a merge method that cannot be imported: {why}"
            raise InputError(what, fix=f"fix or uninstall {package}") from error
        if inspect.isfunction(found) and all(m.function is not found for m in _METHODS.values()):
            method(entry.name, paper="")(found)


def _from_file(name: str) -> Method:
    path, _, attribute = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"demerge_method_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise InputError(f"{path}: no such Python file", fix=FILE_FIX)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        what = f"{path}: cannot be imported: {type(error).__name__}: {error}"
        fix = f"correct the code, until this shows no error: python {path}"
        raise InputError(what, fix=fix) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"{path} has no function '{attribute}'", fix=FILE_FIX)
    return method_of(function)
