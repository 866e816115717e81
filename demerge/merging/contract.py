"""Merge methods as pure functions, and what the engine must know to call them.

A method is a function of one tensor, or of a chunk of one:

    (base [*], deltas [K *], *, weights [K], ...) -> merged [*]

Its keyword-only parameters say what it needs. Those with a default are the user's options; the
annotation is the rule: `float`, `int`, `bool`, `str`, `Literal[...]` or
`Annotated[float, Between(0, 1)]`. The engine supplies those without a default:

    weights     [K], the coefficients
    uniform     [K *], random numbers in [0, 1), keyed by (seed, expert, tensor name, index)
    start       the index of the chunk's first element, counted over the model
    ranges      the timesteps of each expert, None for one that is not known
    snr         [T], the signal-to-noise ratio at each timestep, or None without a schedule
    STATISTIC   what a pass over the model or the tensor found, declared by `statistics`
    NAME        [K *], from NAME.safetensors next to each expert, for example `fisher`. If it is
                annotated `Tensor | None`: [K ...] of any shape, None for a tensor not in the files
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache, reduce
from typing import Any, Literal, TypedDict, TypeVar, Unpack, get_args, get_type_hints

import torch
from torch import Tensor

from demerge.errors import UsageError
from demerge.merging.method_options import Option, read_help, read_option

Scope = Literal["model", "tensor"]
Options = Mapping[str, Any]
Value = TypeVar("Value")
SUPPLIED = ("weights", "uniform", "ranges", "snr", "start")


@dataclass(frozen=True, slots=True)
class Block:
    """A chunk of one tensor: base [n], deltas [K n], inputs by name [K n], its weights [K].

    `start` is the index of its first element, counted over all tensors that are merged.
    """

    base: Tensor
    deltas: Tensor
    inputs: Mapping[str, Tensor | None] = field(default_factory=dict)
    weights: Tensor = field(default_factory=lambda: torch.ones(()))
    start: int = 0

    def input(self, name: str) -> Tensor:
        """Return an input [K n] that every tensor has."""
        tensor = self.inputs[name]
        assert tensor is not None
        return tensor


class Blocks(ABC):
    """The blocks of a tensor or a model. Each iteration is one pass, always in the same order.

    The engine shares the work of `map` and `total` among processes: functions must be pure.
    """

    @abstractmethod
    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks."""

    def map(self, function: Callable[[Block], Value], /) -> Iterator[Value]:
        """Yield function(block) in the order of the blocks."""
        return map(function, self)

    def total(self, count: Callable[[Block], Tensor], /) -> Tensor:
        """Return the sum of count(block) [*]: numbers that add up exactly, in any order."""
        return reduce(Tensor.add_, map(count, self))


@dataclass(frozen=True, slots=True)
class Statistic:
    """A value found by passes over blocks, before the method runs.

    Attributes:
        name: the keyword under which the method and later statistics receive it.
        compute: (blocks: Blocks, *, weights, options, earlier statistics) -> value. It gets those
            that its keywords name. Over a model, a block's own weights are `block.weights`.
        scope: the blocks it sees, given the options. None: no pass, and the value None.
        inputs: the names of [K *] tensors that only this statistic needs from files.
        uses_weights: whether the value changes with the weights; a session computes others once.
    """

    name: str
    compute: Callable[..., Any]
    scope: Callable[[Options], Scope | None] = lambda options: "tensor"
    inputs: tuple[str, ...] = ()
    uses_weights: bool = True


class MethodFields(TypedDict, total=False):
    """What `@method` may say of a function beside its name and paper: fields of `Method`."""

    aliases: tuple[str, ...]
    statistics: tuple[Statistic, ...]
    needs_full_tensor: bool
    full_tensor_if: Callable[[Options], bool]
    force_float64: bool
    presets: Mapping[str, Options]
    neutral_options: Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A registered merge method.

    Attributes:
        inputs: the names of the [K *] tensors it needs from files.
        optional_inputs: those that may have any shape, and that some tensors may lack.
        needs_random: whether it needs random numbers.
        needs_full_tensor: whether it sees whole tensors in their shape, not flat chunks.
        full_tensor_if: tells from the options whether it does, if that depends on them.
        force_float64: whether 16-bit inputs are merged in float64 too, to tell equal numbers apart.
        presets: options with which other programs do the same; `preset=NAME` sets them.
        neutral_options: options with which experts that agree in sign give the weighted mean.
    """

    name: str
    function: Callable[..., Tensor]
    paper: str
    summary: str = ""
    options: Mapping[str, Option] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    optional_inputs: frozenset[str] = frozenset()
    needs_random: bool = False
    statistics: tuple[Statistic, ...] = ()
    needs_full_tensor: bool = False
    full_tensor_if: Callable[[Options], bool] | None = None
    force_float64: bool = False
    aliases: tuple[str, ...] = ()
    presets: Mapping[str, Options] = field(default_factory=dict)
    neutral_options: Options | None = None

    def __repr__(self) -> str:
        options = ", ".join(self.options) or "no options"
        return f"Method({self.name}, {self.paper or 'no paper'}: {options})"

    @property
    def has_weights(self) -> bool:
        """Whether its function or one of its statistics asks for weights."""
        functions = [self.function, *(statistic.compute for statistic in self.statistics)]
        return any("weights" in keyword_names(function) for function in functions)

    @property
    def description(self) -> str:
        """The docstring of the method's file: formula, paper, and what differs from it."""
        return inspect.cleandoc(getattr(inspect.getmodule(self.function), "__doc__", None) or "")

    def specialize(self, *options: Options) -> Method:
        """Return the method with the needs that it has under these resolved options."""
        active = [s for s in self.statistics if any(s.scope(each) for each in options)]
        inputs = dict.fromkeys([*self.inputs, *(name for s in active for name in s.inputs)])
        full = self.needs_full_tensor
        if self.full_tensor_if:
            full = full or any(map(self.full_tensor_if, options))
        return replace(self, inputs=tuple(inputs), needs_full_tensor=full)

    def resolve_options(self, options: Options) -> dict[str, Any]:
        """Return all options: those given, checked; the others by preset or default.

        Raises:
            UsageError: if an option or the preset is unknown, or a value breaks its rule.
        """
        preset = options.get("preset")
        if preset is not None and "preset" not in self.options:
            if str(preset) not in self.presets:
                what = f"method {self.name} has no preset '{preset}'"
                raise UsageError(what, fix=f"its presets: {', '.join(self.presets) or 'none'}")
            own = {name: value for name, value in options.items() if name != "preset"}
            options = {**self.presets[str(preset)], **own}
        for name in options:
            if name not in self.options:
                known = ", ".join(f"{n}={o.default}" for n, o in self.options.items()) or "none"
                near = get_close_matches(name.lower(), self.options, 1, 0.6)
                hint = f"did you mean {near[0]}? " if near else ""
                what = f"method {self.name} has no option '{name}'"
                raise UsageError(what, fix=f"{hint}its options: {known}")
        return {n: o.parse(n, options.get(n, o.default)) for n, o in self.options.items()}

    def split_inputs(self, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the method's options, and apart from them the entries NAME=PATH,PATH of inputs."""
        files = {*self.inputs, *self._statistics_inputs()} - set(self.options)
        own = {name: value for name, value in options.items() if name not in files}
        return own, {name: value for name, value in options.items() if name in files}

    def _statistics_inputs(self) -> list[str]:
        return [name for statistic in self.statistics for name in statistic.inputs]

    def document(self) -> dict[str, Any]:
        """Return what `demerge methods --json` prints, as JSON values."""
        needs = [f"{name}.safetensors per expert" for name in self.inputs]
        for name in self._statistics_inputs():
            needs.append(f"{name}.safetensors per expert, with some options")
        options = {n: {"default": o.default, "rule": o.rule} for n, o in self.options.items()}
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "summary": self.summary,
            "paper": self.paper,
            "options": options,
            "presets": {name: dict(options) for name, options in self.presets.items()},
            "needs": [*needs, "a seed"] if self.needs_random else needs,
        }


def describe_method(
    function: Callable[..., Tensor], name: str, *, paper: str = "", **fields: Unpack[MethodFields]
) -> Method:
    """Read a method's options and needs from its signature.

    Raises:
        UsageError: if the engine cannot call it, or a command line cannot express an option's type.
    """
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    needs = [n for n, default in defaults.items() if default is inspect.Parameter.empty]
    try:
        inspect.signature(function).bind(None, None, **dict.fromkeys(needs))
        hints = get_type_hints(function, include_extras=True)
    except (TypeError, NameError) as error:
        fix = "write function(base, deltas, *, weights, ...), and import what its annotations name"
        raise UsageError(f"{name} is not a merge method: {error}", fix=fix) from error
    found = {*SUPPLIED, *(statistic.name for statistic in fields.get("statistics", ()))}
    inputs = tuple(n for n in needs if n not in found)
    text = inspect.getdoc(function) or ""
    return Method(
        name=name,
        function=function,
        paper=paper,
        summary=text.partition("\n")[0].replace(" [*]", ""),  # without the shape
        options={
            n: read_option(n, default, hints.get(n), read_help(text, n))
            for n, default in defaults.items()
            if n not in needs
        },
        inputs=inputs,
        optional_inputs=frozenset(n for n in inputs if type(None) in get_args(hints.get(n))),
        needs_random="uniform" in needs,
        **fields,
    )


def call_with(function: Callable[..., Any], *positional: Any, supplied: Mapping[str, Any]) -> Any:
    """Call a function with those of `supplied` that its keyword-only parameters name."""
    names = keyword_names(function)
    return function(*positional, **{name: supplied[name] for name in names if name in supplied})


@cache
def keyword_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
