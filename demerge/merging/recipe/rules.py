"""Rules: weights and options for some tensors; the first rule that matches a tensor wins.

A rule is a pattern with weights, options or both; what it does not set is the merge's. A pattern
names tensors or modules, and matches everything below a module:

    down_blocks.*.attentions.**     a glob over dotted names: `*` is one part or a piece of one,
                                    `**` any number of parts
    down  up.1  mid  blocks.3       a block (table in `demerge.merging.blocks`), perhaps with
                                    a glob: up.*.resnets.**
    IN04  M00  OUT11  IN04.attn     a block as the community counts them, in any case
    attn  up.attn  down.0.conv      a kind of layer, everywhere or in a block

A number may be a ramp over depth, `0.2..0.8`: linear over the blocks that the pattern matches, from
input to output, also over blocks that earlier rules took. A single block gets the middle. As text,
a rule is `PATTERN NAME=VALUE ...`, for example `up weights=0.2..0.8,0.5 scale=0.7`.

Differs from other tools: a rule that matches nothing, or that earlier rules hide, is an error.
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
from demerge.merging.blocks import (
    KINDS,
    ORDER,
    block_of,
    is_kind,
    normalize_pattern,
    sort_blocks,
    with_block,
    with_counted_block,
)
from demerge.merging.contract import Method
from demerge.merging.engine.job import Setting
from demerge.merging.engine.validation import resolve_weights

SYNTAX = "write PATTERN NAME=VALUE ..., for example 'up.attn weights=0.2..0.8,0.5 scale=0.7'"
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
COUNTED = re.compile(r"(in|out)\d\d(?=\.|$)")
RAMP = re.compile(rf"\s*({NUMBER})\.\.({NUMBER})\s*")
RESNET = re.compile(r"down_blocks\.\d+\.resnets\.(\d+)")


@dataclass(frozen=True, slots=True)
class Ramp:
    """A number that changes linearly from the first block to the last."""

    first: float
    last: float

    def at(self, place: int, places: int) -> float:
        """Return the value at one of `places` blocks; the middle if there is one block."""
        share = place / (places - 1) if places > 1 else 0.5
        return self.first + share * (self.last - self.first)

    def __str__(self) -> str:
        return f"{self.first!r}..{self.last!r}"


@dataclass(frozen=True, slots=True)
class Rule:
    """Weights, one per expert, and options for the tensors that `pattern` matches.

    Raises:
        UsageError: if it sets nothing.
    """

    pattern: str
    weights: tuple[float | Ramp, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights is None and not self.options:
            raise UsageError(f"rule '{self.pattern}' sets nothing", fix=SYNTAX)

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read `PATTERN NAME=VALUE ...`; `weights` takes one number or ramp per expert."""
        pattern, *words = text.split()
        options = dict(word.partition("=")[::2] for word in words if word.partition("=")[2])
        if len(options) != len(words):
            raise UsageError(f"rule '{text}' cannot be read", fix=SYNTAX)
        weights = options.pop("weights", None)
        return cls.of(pattern, None if weights is None else weights.split(","), options)

    @classmethod
    def of(cls, pattern: str, weights: Iterable[Any] | None, options: Mapping[str, Any]) -> Rule:
        """Return the rule of numbers and ramps that may be text."""
        numbers = None
        try:
            if weights is not None:
                numbers = tuple(_read_ramp(each) or read_number(each) for each in weights)
        except (TypeError, ValueError) as error:
            what = f"the weights of rule '{pattern}' are not numbers"
            raise UsageError(what, fix=SYNTAX) from error
        values = {n.replace("-", "_"): _read_ramp(value) or value for n, value in options.items()}
        return cls(pattern, numbers, values)

    def parse_options(self, method: Method) -> Rule:
        """Return the rule with the values of its options instead of their text.

        Raises:
            UsageError: if the method has no such option, or a value breaks its rule.
        """
        method.resolve_options(self.plain_options)
        options = dict(self.options)
        for name, value in self.plain_options.items():
            options[name] = method.options[name].parse(name, value)
        return replace(self, options=options)

    @property
    def plain_options(self) -> dict[str, Any]:
        """The options that are not ramps."""
        return {name: value for name, value in self.options.items() if not isinstance(value, Ramp)}

    def document(self) -> dict[str, Any]:
        """Return the rule as JSON values, ramps as text."""
        document: dict[str, Any] = {"match": self.pattern}
        if self.weights is not None:
            document["weights"] = [str(w) if isinstance(w, Ramp) else w for w in self.weights]
        if self.options:
            ramps = {n: str(value) for n, value in self.options.items() if isinstance(value, Ramp)}
            document["options"] = {**self.options, **ramps}
        return document

    def __str__(self) -> str:
        words = [self.pattern]
        if self.weights is not None:
            words.append(f"weights={','.join(map(str, self.weights))}")
        return " ".join([*words, *(f"{name}={value}" for name, value in self.options.items())])


@dataclass(frozen=True, slots=True)
class RuleMatch:
    """The tensors that a rule takes, without those of earlier rules."""

    rule: Rule
    names: Sequence[str]


def resolve_rules(
    rules: Sequence[Rule],
    names: Sequence[str],
    method: Method,
    options: Mapping[str, Any],
    weights: Sequence[float],
) -> tuple[dict[str, Setting], list[RuleMatch]]:
    """Return the setting of each tensor that a rule takes, and what each rule took.

    Args:
        names: the tensors that are merged.
        options: the merge's own, before defaults; likewise `weights`.

    Raises:
        UsageError: if a rule matches nothing or nothing that is left, if its weights or options are
            wrong, or if an option belongs to the whole model.
    """
    settings: dict[str, Setting] = {}
    matches: list[RuleMatch] = []
    for rule in rules:
        selected = select(rule.pattern, names, f"rule '{rule}'")
        own = [name for name in selected if name not in settings]
        if not own:
            earlier = [f"'{other.rule}'" for other in matches if set(other.names) & set(selected)]
            owners = ", ".join(earlier[:3])
            what = f"rule '{rule}' is hidden: all {len(selected)} tensors it matches belong to"
            fix = "put it before them, since the first rule that matches wins"
            raise UsageError(f"{what} {owners}", fix=fix)
        blocks = sort_blocks(selected)
        model = Setting(weights, options)
        by_block = {
            block: _resolve_rule(rule, i, len(blocks), method, model)
            for i, block in enumerate(blocks)
        }
        settings |= {name: by_block[block_of(name)] for name in own}
        matches.append(RuleMatch(rule, own))
    whole = Setting(weights, method.resolve_options(options))
    for match in matches:
        _check_model_options(match.rule, settings[match.names[0]], method, whole)
    return settings, matches


def select(pattern: str, names: Sequence[str], what: str) -> list[str]:
    """Return the tensors that a pattern matches, in their order.

    Raises:
        UsageError: if there is none, with what may have been meant.
    """
    matches = compile_pattern(pattern)
    layers = {match[1] for name in names if (match := RESNET.search(name))}
    if COUNTED.match(normalize_pattern(pattern)) and layers not in (set(), {"0", "1"}):
        what = f"{what} counts two layers per block, as SD and SDXL have; this model has"
        fix = f"use its own blocks: {', '.join(sort_blocks(names)[:12])}"
        raise UsageError(f"{what} {len(layers)}", fix=fix)
    selected = [name for name in names if matches(name)]
    if not selected:
        near = _suggest(pattern, names)
        fix = f"the blocks are {', '.join(sort_blocks(names)[:12])}"
        fix = f"did you mean {', '.join(near)}?" if near else fix
        raise UsageError(f"{what} matches no tensor that is merged", fix=fix)
    return selected


def is_pattern(text: str) -> bool:
    """Whether a text is a pattern: parts of letters, digits, `_`, `-` and `*`, joined by dots."""
    return re.fullmatch(r"[\w*-]+(\.[\w*-]+)*", text) is not None


@cache
def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """Return a function that says whether a tensor's name matches a pattern.

    Raises:
        UsageError: if the pattern has empty parts, or characters that no name has.
    """
    if not is_pattern(pattern):
        fix = "join parts by dots, for example down_blocks.*.attentions.**"
        raise UsageError(f"'{pattern}' is not a pattern", fix=fix)
    parts = (pattern := normalize_pattern(pattern)).split(".")
    is_counted = COUNTED.fullmatch(parts[0]) is not None
    has_block = is_counted or parts[0] in ORDER
    rename = with_counted_block if is_counted else with_block
    if parts[-1] in KINDS and (len(parts) == 1 or (has_block and len(parts) <= 3)):
        where = _compile_glob(".".join(parts[:-1]) or "**")
        return lambda name: is_kind(parts[-1], name) and where.match(rename(name)) is not None
    glob = _compile_glob(pattern)
    if has_block:
        return lambda name: bool(glob.match(name) or glob.match(rename(name)))
    return lambda name: glob.match(name) is not None


def _compile_glob(pattern: str) -> re.Pattern[str]:
    """Return the expression of a glob: it matches a name up to a dot or its end."""
    *parts, last = pattern.split(".")
    expression = ""
    for part in parts:
        expression += r"(?:[^.]+\.)*" if part == "**" else rf"{_glob_part(part)}\."
    return re.compile(expression + ("." if last == "**" else rf"{_glob_part(last)}(?:\.|$)"))


def _glob_part(part: str) -> str:
    return re.escape(part).replace(r"\*", "[^.]*")


def _suggest(pattern: str, names: Sequence[str]) -> list[str]:
    """Return up to three modules, blocks or kinds with a similar spelling."""
    wanted = normalize_pattern(pattern).removesuffix(".**")
    depth = len(wanted.split("."))
    known = set(KINDS)
    for name in names:
        for text in (name, with_block(name)):
            parts = text.split(".")
            known |= {".".join(parts[:d]) for d in range(max(1, depth - 1), depth + 2)}
    return get_close_matches(wanted, sorted(known), 3, 0.6)


def _resolve_rule(rule: Rule, i: int, count: int, method: Method, model: Setting) -> Setting:
    """Return the setting of the i-th of `count` blocks that a rule matches."""
    for name, value in rule.options.items():
        known = method.options.get(name)
        if isinstance(value, Ramp) and known is not None and known.kind is not float:
            raise UsageError(f"rule '{rule}': {name} takes no ramp", fix=f"give {known.rule}")
    options = {name: _value_at(value, i, count) for name, value in rule.options.items()}
    weights, K = model.weights, len(model.weights)
    if rule.weights is not None:
        weights = [_value_at(weight, i, count) for weight in rule.weights]
    if len(weights) != K:
        what = f"rule '{rule}' has {len(weights)} weights for {K} experts"
        raise UsageError(what, fix="give one per expert")
    resolved = method.resolve_options({**model.options, **options})
    return Setting(resolve_weights(weights, K), resolved)


def _check_model_options(rule: Rule, own: Setting, method: Method, whole: Setting) -> None:
    """Refuse a rule with an option of which a statistic over the whole model has one value."""
    for statistic in method.statistics:
        parameters = inspect.signature(statistic.compute).parameters
        used = [name for name in parameters if name in rule.options]
        if statistic.scope(own.options) != "model":
            continue
        if used or statistic.scope(whole.options) != "model":
            names = ", ".join(used or rule.options)
            what = f"rule '{rule}' sets {names} for some tensors, but {method.name} uses it over"
            has_scope = "tensor" in getattr(method.options.get("scope"), "choices", ())
            fix = "set it for the whole merge by --option"
            fix = "use scope=tensor in the rule or for the merge" if has_scope else fix
            raise UsageError(f"{what} the whole model", fix=fix)


def read_number(value: Any) -> float:
    """Return a number, given as one or as text.

    Raises:
        TypeError, ValueError: if it is not a number; true and false are not.
    """
    if isinstance(value, bool):
        raise TypeError(value)
    return float(value)


def _read_ramp(value: Any) -> Ramp | None:
    match = RAMP.fullmatch(value) if isinstance(value, str) else None
    return Ramp(float(match[1]), float(match[2])) if match else None


def _value_at(value: Any, i: int, count: int) -> Any:
    return value.at(i, count) if isinstance(value, Ramp) else value
