"""Rules: weights and options of their own for some tensors; of the rules in their order, the first that matches a tensor wins.

A rule is a pattern with weights, options or both; what it does not set is the merge's. A pattern names tensors or modules,
and matches all below a module:

    down_blocks.*.attentions.**     a glob over dotted names: `*` stands for one part or a piece of one, `**` for any parts
    down  up.1  mid  blocks.3  out  a block (`demerge.merging.recipe.blocks` has the table); a glob may follow: up.*.resnets.**
    IN04  M00  OUT11                a block as the community counts them, in any case; IN04.attn
    attn  up.attn  down.0.conv      a kind of layer, everywhere or in a block

A number may be a ramp over depth, `0.2..0.8`: linear over the blocks that the pattern matches, from input to output, blocks
that earlier rules took included; a single block gets the middle. As text, a rule is `PATTERN NAME=VALUE ...`, for example
`up weights=0.2..0.8,0.5 scale=0.7`.

Differs from other tools: a rule that matches nothing, or that earlier rules hide entirely, is an error.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from typing import Any

from demerge.errors import UsageError
from demerge.merging.contract import Method
from demerge.merging.engine.job import Setting
from demerge.merging.engine.validation import resolve_weights
from demerge.merging.recipe.blocks import (
    KINDS,
    ORDER,
    alias,
    block_of,
    by_depth,
    classic,
    is_kind,
    spelt,
)

SYNTAX = "write PATTERN NAME=VALUE ..., for example 'up.attn weights=0.2..0.8,0.5 scale=0.7'"
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
COUNTED = re.compile(r"(in|out)\d\d(?=\.|$)")
RAMP = re.compile(rf"\s*({NUMBER})\.\.({NUMBER})\s*")


@dataclass(frozen=True, slots=True)
class Ramp:
    """A number that changes linearly from the first block to the last."""

    first: float
    last: float

    def at(self, place: int, places: int) -> float:
        """Return the value at one of `places` blocks; the middle where there is one."""
        share = place / (places - 1) if places > 1 else 0.5
        return self.first + share * (self.last - self.first)

    def __str__(self) -> str:
        return f"{self.first!r}..{self.last!r}"


@dataclass(frozen=True, slots=True)
class Rule:
    """Weights, one per expert, and options for the tensors that `pattern` matches; numbers may be ramps.

    Raises:
        UsageError: where it sets nothing.
    """

    pattern: str
    weights: tuple[float | Ramp, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights is None and not self.options:
            raise UsageError(f"rule '{self.pattern}' sets nothing", fix=SYNTAX)

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read `PATTERN NAME=VALUE ...`, where the name `weights` takes one number or ramp per expert."""
        pattern, *words = text.split()
        options = dict(word.partition("=")[::2] for word in words if word.partition("=")[2])
        if len(options) != len(words):
            raise UsageError(f"rule '{text}' cannot be read", fix=SYNTAX)
        weights = options.pop("weights", None)
        return cls.of(pattern, None if weights is None else weights.split(","), options)

    @classmethod
    def of(cls, pattern: str, weights: Iterable[Any] | None, options: Mapping[str, Any]) -> Rule:
        """Return the rule of numbers and ramps that may be text."""
        try:
            numbers = None if weights is None else tuple(_number(weight) for weight in weights)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"the weights of rule '{pattern}' are not numbers", fix=SYNTAX
            ) from error
        return cls(
            pattern,
            numbers,
            {name.replace("-", "_"): _ramp(value) or value for name, value in options.items()},
        )

    def parsed(self, method: Method) -> Rule:
        """Return the rule with the values of its options in place of their text.

        Raises:
            UsageError: where the method has no such option, or a value breaks its rule.
        """
        method.resolve_options(self.plain)
        options = {
            n: v if isinstance(v, Ramp) else method.options[n].parse(n, v)
            for n, v in self.options.items()
        }
        return replace(self, options=options)

    @property
    def plain(self) -> dict[str, Any]:
        """The options that are no ramps."""
        return {name: value for name, value in self.options.items() if not isinstance(value, Ramp)}

    def document(self) -> dict[str, Any]:
        """Return the rule as JSON values, ramps as text."""
        weights = (
            {} if self.weights is None else {"weights": [_plain(weight) for weight in self.weights]}
        )
        options = (
            {"options": {name: _plain(value) for name, value in self.options.items()}}
            if self.options
            else {}
        )
        return {"match": self.pattern, **weights, **options}

    def __str__(self) -> str:
        weights = (
            []
            if self.weights is None
            else [f"weights={','.join(str(_plain(w)) for w in self.weights)}"]
        )
        return " ".join(
            [
                self.pattern,
                *weights,
                *(f"{name}={_plain(value)}" for name, value in self.options.items()),
            ]
        )


@dataclass(frozen=True, slots=True)
class Matched:
    """The tensors that a rule takes, those of earlier rules left out."""

    rule: Rule
    names: Sequence[str]


def settle(
    rules: Sequence[Rule],
    names: Sequence[str],
    method: Method,
    options: Mapping[str, Any],
    weights: Sequence[float],
) -> tuple[dict[str, Setting], list[Matched]]:
    """Return the setting of each tensor that a rule takes, and what each rule took.

    Args:
        names: the tensors that are merged.
        options: the merge's own, as given; likewise `weights`.

    Raises:
        UsageError: where a rule matches nothing or nothing that is left, or its weights or options are wrong or belong to
            the whole model.
    """
    settings: dict[str, Setting] = {}
    taken: list[Matched] = []
    for rule in rules:
        found = select(rule.pattern, names, f"rule '{rule}'")
        mine = [name for name in found if name not in settings]
        if not mine:
            earlier = [f"'{other.rule}'" for other in taken if set(other.names) & set(found)]
            raise UsageError(
                f"rule '{rule}' is hidden: all {len(found)} tensors it matches belong to {', '.join(earlier[:3])}",
                fix="put it before them, since the first rule that matches wins",
            )
        blocks = by_depth(found)
        per_block = {
            block: _setting(rule, place, len(blocks), method, options, weights)
            for place, block in enumerate(blocks)
        }
        settings |= {name: per_block[block_of(name)] for name in mine}
        taken.append(Matched(rule, mine))
    _check_whole_tensor_options(
        taken, settings, method, Setting(weights, method.resolve_options(options))
    )
    return settings, taken


def select(pattern: str, names: Sequence[str], what: str) -> list[str]:
    """Return the tensors that a pattern matches, in their order.

    Raises:
        UsageError: where there is none, with what it may have meant.
    """
    holds = matcher(pattern)
    layers = {m[1] for name in names if (m := re.search(r"down_blocks\.\d+\.resnets\.(\d+)", name))}
    if COUNTED.match(spelt(pattern)) and layers not in (set(), {"0", "1"}):
        told = f"{what} counts two layers to a block, as SD and SDXL have; this model has {len(layers)}"
        raise UsageError(told, fix=f"use its own blocks: {', '.join(by_depth(names)[:12])}")
    found = [name for name in names if holds(name)]
    if not found:
        near = _near(pattern, names)
        fix = (
            f"did you mean {', '.join(near)}?"
            if near
            else f"the blocks are {', '.join(by_depth(names)[:12])}"
        )
        raise UsageError(f"{what} matches no tensor that is merged", fix=fix)
    return found


def only(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """Return the tensors that any pattern matches.

    Raises:
        UsageError: where a pattern matches none.
    """
    return {name for pattern in patterns for name in select(pattern, names, f"--only '{pattern}'")}


def is_pattern(text: str) -> bool:
    """Whether a text is a pattern: parts of letters, digits, `_`, `-` and `*`, joined by dots."""
    return re.fullmatch(r"[\w*-]+(\.[\w*-]+)*", text) is not None


@cache
def matcher(pattern: str) -> Callable[[str], bool]:
    """Return whether a tensor's name matches a pattern, as a function of the name.

    Raises:
        UsageError: where the pattern has empty parts or characters that no name has.
    """
    if not is_pattern(pattern):
        raise UsageError(
            f"'{pattern}' is not a pattern",
            fix="join parts by dots, for example down_blocks.*.attentions.**",
        )
    parts = (pattern := spelt(pattern)).split(".")
    counted = COUNTED.fullmatch(parts[0]) is not None
    short, named = counted or parts[0] in ORDER, classic if counted else alias
    if parts[-1] in KINDS and (len(parts) == 1 or (short and len(parts) <= 3)):
        kind, where = parts[-1], _glob(".".join(parts[:-1]) or "**")
        return lambda name: is_kind(kind, name) and where.match(named(name)) is not None
    glob = _glob(pattern)
    return lambda name: (
        glob.match(name) is not None or (short and glob.match(named(name)) is not None)
    )


def _glob(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a glob; it matches the beginning of a name up to a dot or the end."""
    parts = [
        re.escape(part).replace(r"\*", "[^.]*") if part != "**" else None
        for part in pattern.split(".")
    ]
    text = "".join(r"(?:[^.]+\.)*" if part is None else rf"{part}\." for part in parts[:-1])
    return re.compile(text + ("." if parts[-1] is None else rf"{parts[-1]}(?:\.|$)"))


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Return up to three modules, blocks or kinds that are spelt much like the pattern."""
    wanted = spelt(pattern).removesuffix(".**")
    depths = {len(wanted.split(".")) + more for more in (-1, 0, 1)}
    known = {
        ".".join(text.split(".")[:d])
        for name in names
        for text in (name, alias(name))
        for d in depths
        if d > 0
    }
    return get_close_matches(wanted, sorted(known | set(KINDS)), 3, 0.6)


def _setting(
    rule: Rule,
    place: int,
    places: int,
    method: Method,
    options: Mapping[str, Any],
    weights: Sequence[float],
) -> Setting:
    for name, value in rule.options.items():
        if (
            isinstance(value, Ramp)
            and name in method.options
            and method.options[name].kind is not float
        ):
            raise UsageError(
                f"rule '{rule}': {name} takes no ramp", fix=f"give {method.options[name].rule}"
            )
    here = {
        name: value.at(place, places) if isinstance(value, Ramp) else value
        for name, value in rule.options.items()
    }
    mine = weights
    if rule.weights is not None:
        mine = [
            weight.at(place, places) if isinstance(weight, Ramp) else weight
            for weight in rule.weights
        ]
        if len(mine) != len(weights):
            raise UsageError(
                f"rule '{rule}' has {len(mine)} weights for {len(weights)} experts",
                fix="give one per expert",
            )
    return Setting(resolve_weights(mine, len(weights)), method.resolve_options({**options, **here}))


def _check_whole_tensor_options(
    taken: Sequence[Matched], settings: Mapping[str, Setting], method: Method, whole: Setting
) -> None:
    """Refuse a rule that sets for some tensors what a statistic over the whole model has one value of."""
    for matched in taken:
        mine = settings[matched.names[0]].options
        for statistic in method.statistics:
            used = [
                n
                for n in inspect.signature(statistic.compute).parameters
                if n in matched.rule.options
            ]
            if statistic.scope(mine) == "model" and (
                used or statistic.scope(whole.options) != "model"
            ):
                names = ", ".join(used or matched.rule.options)
                scoped = "tensor" in getattr(method.options.get("scope"), "choices", ())
                raise UsageError(
                    f"rule '{matched.rule}' sets {names} for some tensors, but {method.name} uses it over the whole model",
                    fix="use scope=tensor in the rule or for the merge"
                    if scoped
                    else "set it for the whole merge by --option",
                )


def number(value: Any) -> float:
    """Return a number, given as one or as text.

    Raises:
        TypeError, ValueError: where it is none; true and false are none.
    """
    if isinstance(value, bool):
        raise TypeError(value)
    return float(value)


def _number(value: Any) -> float | Ramp:
    return _ramp(value) or number(value)


def _ramp(value: Any) -> Ramp | None:
    found = RAMP.fullmatch(value) if isinstance(value, str) else None
    return Ramp(float(found[1]), float(found[2])) if found else None


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Ramp) else value
