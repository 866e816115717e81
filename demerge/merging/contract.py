"""Merge methods as pure functions, and what the engine must know to call them.

A method is a function

    (base [*], deltas [K *], *, weights [K], ...) -> merged [*]

of one tensor, or of a chunk of one. Its keyword-only parameters say what it needs. Those with a default are the user's
options, their annotation being the rule: `float`, `int`, `bool`, `str`, `Literal[...]`, or
`Annotated[float, Between(0, 1)]`. Those without a default come from the engine:

    weights     [K], the coefficients
    uniform     [K *], random numbers in [0, 1) that depend on (seed, expert, tensor name, index) alone
    start       the index of the chunk's first element, counted over the model
    ranges      the timesteps of each expert, or None where they are not known
    snr         [T], the signal-to-noise ratio at each timestep, or None where the base names no schedule
    STATISTIC   what a pass over the model or the tensor found, declared by `statistics`
    NAME        [K *], from NAME.safetensors beside each expert, for example `fisher`; where its annotation is
                `Tensor | None`, [K ...] of any shape, and None for a tensor that the files do not have, as with `gram`
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache, reduce
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from demerge.errors import UsageError
from demerge.merging.method_options import Option, option

Scope = Literal["model", "tensor"]
Value = TypeVar("Value")
SUPPLIED = ("weights", "uniform", "ranges", "snr", "start")


@dataclass(frozen=True, slots=True)
class Block:
    """A chunk of one tensor: base [n], deltas [K n], the inputs [K n] asked for by name, the weights [K] of this tensor.

    `start` is the index of its first element, counted over all tensors that are merged, one after the other.
    """

    base: Tensor
    deltas: Tensor
    inputs: Mapping[str, Tensor | None] = field(default_factory=dict)
    weights: Tensor = field(default_factory=lambda: torch.ones(()))
    start: int = 0


class Blocks(ABC):
    """The blocks of a tensor or a model; each iteration is one pass over them, in an order that never changes.

    The engine's `map` and `total` share the work among processes: functions must be pure, and what they return travels, and is
    held for all blocks by `map`.
    """

    @abstractmethod
    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks."""

    def map(self, function: Callable[[Block], Value], /) -> Iterator[Value]:
        """Yield function(block) in the order of the blocks."""
        return map(function, self)

    def total(self, count: Callable[[Block], Tensor], /) -> Tensor:
        """Return the sum of count(block) [*], of numbers whose sum has no rounding: their order is not fixed."""
        return reduce(Tensor.add_, map(count, self))


@dataclass(frozen=True, slots=True)
class Statistic:
    """A number or vector that one or more passes over blocks yield, before the method runs.

    Attributes:
        name: the keyword under which methods and later statistics receive it.
        compute: (blocks: Blocks, *, weights, options, earlier statistics: those it names) -> value. Over a model the
            weights of a block are `block.weights`, since rules may give tensors different ones.
        scope: which blocks, given the options: those of the model, of each tensor, or None for no pass and the value
            None.
        inputs: the names of [K *] tensors that only this statistic needs from files.
    """

    name: str
    compute: Callable[..., Any]
    scope: Callable[[Mapping[str, Any]], Scope | None]
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """A registered merge method.

    Attributes:
        inputs: the names of the [K *] tensors it needs from files.
        partial: the names of those that may be of any shape, and that some tensors may lack.
        draws: whether it needs random numbers.
        whole: whether it must see whole tensors in their shape; else it gets flat chunks.
        precise: whether the arithmetic is float64 for 16-bit inputs too: where it chooses between numbers that may be equal.
        whole_with: tells from the options whether it must, for a method that need not always.
        presets: by name, the options with which other programs do the same; `preset=NAME` sets them.
        off: options with which it is the weighted mean of experts that agree in sign, where there are such; its tests use them.
    """

    name: str
    function: Callable[..., Tensor]
    summary: str
    paper: str
    options: Mapping[str, Option]
    inputs: tuple[str, ...] = ()
    partial: frozenset[str] = frozenset()
    draws: bool = False
    statistics: tuple[Statistic, ...] = ()
    whole: bool = False
    off: Mapping[str, Any] | None = None
    aliases: tuple[str, ...] = ()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    whole_with: Callable[[Mapping[str, Any]], bool] | None = None
    precise: bool = False

    def __repr__(self) -> str:
        """Name it, its paper and its options."""
        return f"Method({self.name}, {self.paper or 'no paper'}: {', '.join(self.options) or 'no options'})"

    @property
    def weighted(self) -> bool:
        """Whether it has weights: its function or one of its statistics asks for them."""
        asked = [self.function, *(statistic.compute for statistic in self.statistics)]
        return any("weights" in inspect.signature(function).parameters for function in asked)

    def under(self, *options: Mapping[str, Any]) -> Method:
        """Return the method as it is with these settled options: what it then needs from files, and whether whole tensors."""
        active = [s for s in self.statistics if any(s.scope(given) for given in options)]
        inputs = dict.fromkeys([*self.inputs, *(name for s in active for name in s.inputs)])
        whole = self.whole or (self.whole_with is not None and any(map(self.whole_with, options)))
        return replace(self, inputs=tuple(inputs), whole=whole)

    def settle(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options, the given ones checked and the others by the preset, where one is named, or by default.

        Raises:
            UsageError: where an option or the preset is unknown, or breaks its rule.
        """
        options = self._expanded(options)
        for name in options:
            if name not in self.options:
                known = ", ".join(f"{n}={o.default}" for n, o in self.options.items()) or "none"
                near = get_close_matches(name.lower(), self.options, 1, 0.6)
                meant = f"did you mean {near[0]}? " if near else ""
                raise UsageError(
                    f"method {self.name} has no option '{name}'", fix=f"{meant}its options: {known}"
                )
        return {
            name: option.parse(name, options.get(name, option.default))
            for name, option in self.options.items()
        }

    def separate(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the method's options, and apart from them what NAME=PATH,PATH says of tensors that it may need."""
        files = {
            *self.inputs,
            *(name for statistic in self.statistics for name in statistic.inputs),
        } - set(self.options)
        asked = {name: value for name, value in options.items() if name not in files}
        return asked, {name: value for name, value in options.items() if name in files}

    def _expanded(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        if "preset" not in options or "preset" in self.options:
            return options
        name = str(options["preset"])
        if name not in self.presets:
            known = ", ".join(self.presets) or "none"
            raise UsageError(
                f"method {self.name} has no preset '{name}'", fix=f"its presets: {known}"
            )
        return {**self.presets[name], **{n: value for n, value in options.items() if n != "preset"}}

    def document(self) -> dict[str, Any]:
        """Return what there is to know, as JSON values."""
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "summary": self.summary,
            "paper": self.paper,
            "options": {
                name: {"default": o.default, "rule": o.rule} for name, o in self.options.items()
            },
            "presets": {name: dict(options) for name, options in self.presets.items()},
            "needs": self._needs(),
        }

    def _needs(self) -> list[str]:
        some = [name for s in self.statistics for name in s.inputs]
        files = [f"{name}.safetensors per expert" for name in self.inputs]
        files += [f"{name}.safetensors per expert, with some options" for name in some]
        return [*files, *(["a seed"] if self.draws else [])]


def describe(
    function: Callable[..., Tensor],
    name: str,
    *,
    paper: str,
    statistics: Sequence[Statistic] = (),
    whole: bool = False,
    off: Mapping[str, Any] | None = None,
) -> Method:
    """Read a method's options and needs from its signature.

    Raises:
        UsageError: where the engine cannot call it, or an option is of a type that cannot be written on a command line.
    """
    keywords = [
        p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    needs = [p.name for p in keywords if p.default is p.empty]
    hints = _hints(function, name, needs)
    inputs = tuple(n for n in needs if n not in SUPPLIED and n not in {s.name for s in statistics})
    return Method(
        name=name,
        function=function,
        summary=(inspect.getdoc(function) or "").partition("\n")[0],
        paper=paper,
        options={
            p.name: option(p.name, p.default, hints.get(p.name))
            for p in keywords
            if p.default is not p.empty
        },
        inputs=inputs,
        partial=frozenset(n for n in inputs if type(None) in get_args(hints.get(n))),
        draws="uniform" in needs,
        statistics=tuple(statistics),
        whole=whole,
        off=off,
    )


def _hints(function: Callable[..., Tensor], name: str, needs: Sequence[str]) -> dict[str, Any]:
    """Return the annotations of a function that can be called as a method."""
    try:
        inspect.signature(function).bind(None, None, **dict.fromkeys(needs))
        return get_type_hints(function, include_extras=True)
    except (TypeError, NameError) as error:
        fix = "write it as function(base, deltas, *, weights, ...), and import what its annotations name"
        raise UsageError(f"{name} is not a merge method: {error}", fix=fix) from error


def called(function: Callable[..., Any], *positional: Any, supplied: Mapping[str, Any]) -> Any:
    """Call a function with those of `supplied` that its keyword-only parameters name."""
    return function(
        *positional, **{name: supplied[name] for name in _keywords(function) if name in supplied}
    )


@cache
def _keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(
        p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
    )
