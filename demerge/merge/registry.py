"""Merge methods as pure functions, and what the engine must know to call them.

A method is a function

    (base [*], deltas [K *], *, weights [K], ...) -> merged [*]

of one tensor, or of a chunk of one. Its keyword-only parameters say what it needs. Those with a default are the user's
options, their annotation being the rule: `float`, `int`, `bool`, `str`, `Literal[...]`, or
`Annotated[float, Between(0, 1)]`. Those without a default come from the engine:

    weights     [K], the coefficients
    uniform     [K *], random numbers in [0, 1) that depend on (seed, expert, tensor name, index) alone
    STATISTIC   what a pass over the model or the tensor found, declared by `statistics`
    NAME        [K *], from NAME.safetensors beside each expert, for example `fisher`

`@method` registers the function and returns it unchanged. Other packages register by the entry point group
`demerge.methods`.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from torch import Tensor

from demerge.errors import InputError, UsageError
from demerge.merge.options import Option, option

Scope = Literal["model", "tensor"]
Function = TypeVar("Function", bound=Callable[..., Tensor])
SUPPLIED = ("weights", "uniform")


@dataclass(frozen=True, slots=True)
class Block:
    """A chunk of one tensor: base [n], deltas [K n], and the inputs [K n] that the method asked for by name."""

    base: Tensor
    deltas: Tensor
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Statistic:
    """A number or vector that one or more passes over blocks yield, before the method runs.

    Attributes:
        name: the keyword under which methods and later statistics receive it.
        compute: (blocks, *, weights, options, earlier statistics: those it names) -> value; `blocks` may be iterated
            again, each time being one pass.
        scope: which blocks, given the options: those of the model, of each tensor, or None for no pass and the value
            None.
    """

    name: str
    compute: Callable[..., Any]
    scope: Callable[[Mapping[str, Any]], Scope | None]


@dataclass(frozen=True, slots=True)
class Method:
    """A registered merge method.

    Attributes:
        inputs: the names of the [K *] tensors it needs from files.
        draws: whether it needs random numbers.
        whole: whether it must see whole tensors in their shape; else it gets flat chunks.
        off: options with which it is the weighted mean of experts that agree in sign, where there are such; its tests use them.
    """

    name: str
    function: Callable[..., Tensor]
    summary: str
    paper: str
    options: Mapping[str, Option]
    inputs: tuple[str, ...] = ()
    draws: bool = False
    statistics: tuple[Statistic, ...] = ()
    whole: bool = False
    off: Mapping[str, Any] | None = None
    aliases: tuple[str, ...] = ()

    def settle(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options, the given ones checked and the others by default.

        Raises:
            UsageError: where an option is unknown or breaks its rule.
        """
        for name in options:
            if name not in self.options:
                known = ", ".join(f"{n}={o.default}" for n, o in self.options.items()) or "none"
                raise UsageError(f"method {self.name} has no option '{name}'", fix=f"its options: {known}")
        return {name: option.parse(name, options.get(name, option.default)) for name, option in self.options.items()}

    def document(self) -> dict[str, Any]:
        """Return what there is to know, as JSON values."""
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "summary": self.summary,
            "paper": self.paper,
            "options": {name: {"default": o.default, "rule": o.rule} for name, o in self.options.items()},
            "needs": [*(f"{name}.safetensors per expert" for name in self.inputs), *(["a seed"] if self.draws else [])],
        }


_METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    paper: str,
    aliases: Sequence[str] = (),
    statistics: Sequence[Statistic] = (),
    whole: bool = False,
    off: Mapping[str, Any] | None = None,
) -> Callable[[Function], Function]:
    """Register a function as the merge method `name`; the function itself is returned unchanged."""

    def register(function: Function) -> Function:
        if name in _METHODS:
            raise UsageError(f"merge method '{name}' is registered twice", fix="rename one of the two")
        described = describe(function, name, paper=paper, statistics=statistics, whole=whole, off=off)
        _METHODS[name] = replace(described, aliases=tuple(aliases))
        return function

    return register


def describe(
    function: Callable[..., Tensor],
    name: str,
    *,
    paper: str,
    statistics: Sequence[Statistic] = (),
    whole: bool = False,
    off: Mapping[str, Any] | None = None,
) -> Method:
    """Read a method's options and needs from its signature."""
    hints = get_type_hints(function, include_extras=True)
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    needs = [p.name for p in keywords if p.default is p.empty]
    found = {s.name for s in statistics}
    return Method(
        name=name,
        function=function,
        summary=(inspect.getdoc(function) or "").partition("\n")[0],
        paper=paper,
        options={p.name: option(p.default, hints[p.name]) for p in keywords if p.default is not p.empty},
        inputs=tuple(n for n in needs if n not in SUPPLIED and n not in found),
        draws="uniform" in needs,
        statistics=tuple(statistics),
        whole=whole,
        off=off,
    )


def methods() -> dict[str, Method]:
    """Return all methods by name, with those of other packages."""
    _load_entry_points()
    return dict(sorted(_METHODS.items()))


def find(name: str) -> Method:
    """Return the method of a name, or of `path.py:function`.

    Raises:
        UsageError: where there is none.
    """
    known = methods()
    for candidate in known.values():
        if name in (candidate.name, *candidate.aliases):
            return candidate
    if ".py:" in name:
        return _from_file(name)
    raise UsageError(f"unknown merge method '{name}'", fix=f"use one of {', '.join(known)}")


def of(function: Callable[..., Tensor]) -> Method:
    """Return the registered method of a function; one that is not registered is described by its signature alone."""
    registered = (m for m in methods().values() if m.function is function)
    return next(registered, None) or describe(function, function.__name__, paper="")


def called(function: Callable[..., Any], *positional: Any, supplied: Mapping[str, Any]) -> Any:
    """Call a function with those of `supplied` that its keyword-only parameters name."""
    names = inspect.signature(function).parameters
    return function(*positional, **{n: v for n, v in supplied.items() if n in names})


@cache
def _load_entry_points() -> None:
    for entry in entry_points(group="demerge.methods"):
        entry.load()


def _from_file(name: str) -> Method:
    path, _, attribute = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"demerge_method_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise InputError(f"{path}: no such Python file", fix="write --method path.py:function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path}: cannot be imported: {type(error).__name__}: {error}", fix="mend the file") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"{path} has no function '{attribute}'", fix="write --method path.py:function")
    return of(function)
