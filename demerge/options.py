"""The options of a stage: a frozen dataclass is the only place that describes them.

    @dataclass(frozen=True, kw_only=True, repr=False)
    class FinetuneOptions(Options):
        max_train_steps: int = option(1000, "Optimizer steps per expert.", ge=1, panel="Training")

A field gives the name, the type, the default, the help text, the rule and the panel. The command
line (`demerge.cli.options`), the Python API, `--config FILE` and the records all read it there. A
`Literal` type lists the choices.
"""

from __future__ import annotations

import math
import operator
import types
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from demerge.errors import UsageError

BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}


@dataclass(frozen=True, slots=True)
class Spec:
    """What a field says about its option next to its name, type and default.

    Attributes:
        help: a noun phrase; the choices and the default are printed by the command line itself.
        panel: the heading of the help page that it stands under.
        flags: names on the command line if not `--the-name`.
        argument: whether it is positional on the command line.
        metavar: what stands for the value in the help.
        ge, gt, le, lt: the interval that a number must lie in.
        parse: makes the value out of the text of the command line or of a config file.
        shown_default: the words for the default where None stands for something else.
        multiple: whether the command line takes it several times; `parse` gets all the texts.
        write: the inverse of `parse`, if that does not read `str(value)`.
        recorded: whether OUT/COMMAND.yaml holds it: how work is shared out is no part of it.
    """

    help: str
    panel: str | None = None
    flags: tuple[str, ...] = ()
    argument: bool = False
    metavar: str | None = None
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    parse: Callable[[Any], Any] | None = None
    shown_default: str | None = None
    multiple: bool = False
    write: Callable[[Any], str] | None = None
    recorded: bool = True

    @property
    def rule(self) -> str:
        """The interval in words, empty if there is none: `above 0 and at most 1`."""
        bounds = [(name, getattr(self, name)) for name in BOUNDS]
        words = [f"{BOUNDS[n][1]} {of:g}" for n, of in bounds if of not in (None, math.inf)]
        return " and ".join(words)

    def allows(self, value: float) -> bool:
        """Whether a number lies in the interval; NaN never does."""
        bounds = [(BOUNDS[name][0], getattr(self, name)) for name in BOUNDS]
        return all(holds(value, bound) for holds, bound in bounds if bound is not None)


def option(default: Any = MISSING, help: str = "", *, factory: Any = MISSING, **rest: Any) -> Any:
    """Return a dataclass field that is an option; `rest` are the attributes of `Spec`."""
    metadata = {"option": Spec(help, **rest)}
    return field(default=default, default_factory=factory, metadata=metadata)


def again(kind: type[Options], name: str, **changes: Any) -> Any:
    """Return the option `name` of another class, with another `default` or changes of `Spec`."""
    of = kind.__dataclass_fields__[name]
    default = changes.pop("default", of.default)
    return field(default=default, metadata={"option": replace(spec_of(of), **changes)})


def parse_numbers(text: str, what: str) -> tuple[int, ...]:
    """Read whole numbers of at least 0, separated by commas; `what` names them in the error."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        fix = f"give whole numbers separated by commas, for example --{what} 0,1,2"
        raise UsageError(f"{what} '{text}' are not numbers", fix=fix)
    return tuple(map(int, parts))


def spec_of(of: Any) -> Spec:
    """Return the `Spec` of a dataclass field."""
    spec: Spec = of.metadata["option"]
    return spec


@cache
def types_of(kind: type[Options]) -> dict[str, Any]:
    """Return the type of each option by name."""
    return get_type_hints(kind)


def choices_of(type_: Any) -> tuple[Any, ...]:
    """Return the choices of a `Literal`, also of one that may be None; empty for other types."""
    if get_origin(type_) in (Union, types.UnionType):
        return tuple(choice for part in get_args(type_) for choice in choices_of(part))
    return get_args(type_) if get_origin(type_) is Literal else ()


class Options:
    """Base of all options: it checks choices and intervals, and takes a text for a path.

    Raises:
        UsageError: if a value is not one of the choices or outside its interval.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        types_ = types_of(type(self))  # type: ignore[arg-type]
        for of in (of for of in fields(self) if "option" in of.metadata):
            value, type_, spec = getattr(self, of.name), types_[of.name], spec_of(of)
            is_text = isinstance(value, str)
            if is_text and Path in (type_, *get_args(type_)):
                object.__setattr__(self, of.name, Path(value))
            choices = choices_of(type_)
            if choices:
                allowed = value in choices or (value is None and of.default is None)
                self.require(of.name, allowed, f"one of {', '.join(map(str, choices))}")
            elif spec.rule and value is not None and not (is_text and str in get_args(type_)):
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                self.require(of.name, is_number and spec.allows(value), spec.rule)

    def require(self, name: str, holds: bool, rule: str) -> None:
        """Raise `UsageError` with the rule if the option `name` breaks it."""
        if not holds:
            fix = f"it must be {rule}"
            raise UsageError(f"{name} is {getattr(self, name)!r}", fix=fix)

    def __repr__(self) -> str:
        changed = (of for of in fields(self) if getattr(self, of.name) != of.default)
        values = ", ".join(f"{of.name}={getattr(self, of.name)!r}" for of in changed)
        return f"{type(self).__name__}({values})"

    def document(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        values = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def config_of(*groups: Options) -> dict[str, Any]:
    """Return options as a file for `--config` holds them; those that are None are left out."""
    values = {}
    for group in groups:
        for of in fields(group):
            spec, value = spec_of(of), getattr(group, of.name)
            if value is None:
                continue
            if spec.multiple:
                value = [str(each) for each in value]
            elif spec.write is not None:
                value = spec.write(value)
            elif isinstance(value, Path):
                value = str(value)
            name = max(spec.flags or (of.name,), key=len).lstrip("-")
            values[name.replace("-", "_")] = value
    return values


Split = Literal["train", "test", "all"]


@dataclass(frozen=True, kw_only=True, repr=False)
class DataOptions(Options):
    """Which images a stage reads."""

    data: str = option(
        help="Image folder, CIFAR-10 batches, idx files, npz, digits, or hf:NAME.", panel="Data"
    )
    split: Split = option("train", "Split of the images.", panel="Data")
    skip_broken: bool = option(False, "Leave out images that cannot be read.", panel="Data")


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelOptions(Options):
    """Which pipeline a stage reads."""

    model: str = option(help="Pipeline folder or Hub id.", argument=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class DeviceOptions(Options):
    """Where a stage computes, and on images of which size."""

    device: str = option("auto", "cpu, cuda, cuda:1 or mps; auto takes the fastest one.")
    resolution: int | None = option(
        None, "Side of the images in pixels.", ge=1, le=1 << 13, shown_default="the base's own"
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class SeedOptions(Options):
    """What random numbers follow from."""

    seed: int = option(0, "Seed of every random number.", ge=0)
