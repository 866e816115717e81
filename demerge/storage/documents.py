"""Documents that people write: recipes and config files in YAML, TOML or JSON, read without trust.

A YAML file may hold plain values only: at most 1 MB, 16 levels deep, no anchors, aliases or tags,
no key twice. The keys of a table are checked: an unknown one is refused with the nearest known one.
"""

from __future__ import annotations

import csv
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import yaml

from demerge.errors import InputError, UsageError
from demerge.storage.safetensors_header import read_bytes, read_json

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
NAMES: Mapping[type, str] = {
    str: "text", int: "a whole number", float: "a number", list: "a list [..., ...]",
    dict: "a table", bool: "true or false",
}  # fmt: skip


def read_document(path: Path, *, words: bool = False) -> dict[str, Any]:
    """Read a table from a YAML, TOML (.toml) or JSON (.json) file.

    Args:
        words: whether `no`, `off`, `on` and `yes` in YAML are words, not switches.

    Raises:
        InputError: if the file is missing, too large, too deep, or not a table.
    """
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix == ".toml":
        try:
            return tomllib.loads(_read_text(path))
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise _damaged(path, f"not valid TOML ({str(error)[:120]})") from error
    return _read_yaml(path, _WordLoader if words else _SafeLoader)


def read_rows(path: Path) -> list[list[str]]:
    """Read the rows of a CSV file below its head, without empty ones.

    Raises:
        InputError: if the file is missing or too large.
    """
    return [row for row in list(csv.reader(_read_text(path).splitlines()))[1:] if row]


def check_known_keys(table: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Check that all keys of a table are known.

    Raises:
        UsageError: if not, naming the first unknown one and the nearest known one.
    """
    for key in table:
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            fix = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
            raise UsageError(f"{where}: unknown key '{str(key)[:80]}'", fix=fix)


def typed(table: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """Return the value of a key, None if there is none.

    Raises:
        UsageError: if the value is of another kind.
    """
    value = table.get(key)
    has_kind = isinstance(value, kinds) and (not isinstance(value, bool) or kinds is bool)
    if value is None or has_kind:
        return value
    wanted = [NAMES[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,))]
    fix = f"write {' or '.join(wanted)}"
    raise UsageError(f"{where}: {key} is {str(value)[:80]!r}", fix=fix)


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _damaged(path, "not UTF-8 text") from error


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is ten times faster


class _WordLoader(_SafeLoader):  # type: ignore[misc]
    """YAML 1.2: `true` and `false` are switches; `no`, `off`, `on` and `yes` are words."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        letter: [(tag, rule) for tag, rule in rules if not tag.endswith(":bool")]
        for letter, rules in _SafeLoader.yaml_implicit_resolvers.items()
    }


_WordLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _read_yaml(path: Path, loader: Any) -> dict[str, Any]:
    text = _read_text(path)
    try:
        _check_events(path, yaml.parse(text, loader))
        _check_unique_keys(path, yaml.compose(text, loader))
        document = yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise _damaged(path, f"not valid YAML ({reason})") from error
    if not isinstance(document, dict):
        raise _damaged(path, "it is not a table")
    return document


def _check_events(path: Path, events: Any) -> None:
    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _damaged(path, "anchors and aliases are not allowed")
        if getattr(event, "tag", None):
            raise _damaged(path, f"the tag {event.tag[:40]} is not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _damaged(path, f"more than {MAX_DEPTH} levels deep")


def _check_unique_keys(path: Path, node: Any) -> None:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check_unique_keys(path, child)
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(keys) != len(node.value) or len(set(keys)) != len(keys):
            raise _damaged(path, "a key occurs twice, or is not plain text")
        for _, child in node.value:
            _check_unique_keys(path, child)


def _damaged(path: Path, what: str) -> InputError:
    fix = "write plain values (text, numbers, lists, tables), each key once, saved as UTF-8 text"
    return InputError(f"{path}: {what}", fix=fix)


def check_replaceable(path: Path, kind: str, is_own: Callable[[Path], bool], fix: str) -> None:
    """Check that a place is free or holds an older file of the same kind.

    Raises:
        UsageError: if it holds something else.
    """
    if path.exists() and not (path.is_file() and is_own(path)):
        raise UsageError(f"{path} exists and is not {kind}", fix=fix)
