"""The only reader of records: JSON in, a checked value out, or one sentence on what is wrong.

A format is a type: a `Record` for what only a file holds, or the frozen dataclass that the value is
in memory. A record of demerge's own may hold no key that its type does not name; a `Foreign` one
(of diffusers, transformers, peft) may, but what is read of it has a type and a range too. Types are
strict: true is not 1, "8" is not 8, and NaN is not JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
)

from demerge.errors import DemergeError, InputError
from demerge.storage.safetensors_header import parse_json, read_json

T = TypeVar("T")
MAX_TIMESTEPS = 1 << 20
SHOWN = 60  # characters of a key or value in a message

Table = dict[str, JsonValue]
Texts = dict[str, str]
OLDER_NAMES = {"p": "global_prob"}  # of options, in records of older versions
Count = Annotated[int, Field(ge=0)]


def _with_current_names(options: Table) -> Table:
    return {OLDER_NAMES.get(name, name): value for name, value in options.items()}


Settings = Annotated[Table, AfterValidator(_with_current_names)]  # options, by today's names


def _ordered(span: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= span[0] < span[1] <= MAX_TIMESTEPS:
        raise ValueError(f"must be [start, stop] with 0 <= start < stop <= {MAX_TIMESTEPS}")
    return span


Span = Annotated[tuple[int, int], AfterValidator(_ordered)]  # the training timesteps [start, stop)


class Record(BaseModel):
    """A document that demerge writes."""

    model_config = ConfigDict(frozen=True)


class Foreign(BaseModel):
    """A document of another program, of which demerge reads the keys named here."""

    model_config = ConfigDict(frozen=True)


def read_record(path: Path, kind: type[T], *, fix: str) -> T:
    """Read a JSON file as a value of a type: a `Record`, a `Foreign` one, or a dataclass.

    Args:
        fix: what a user does about a file that is refused.

    Raises:
        InputError: if the file is missing, not a regular file, larger than 16 MB, more than 32
            levels deep, not JSON, or not of the type; it names the file, the key, the rule and the
            value.
    """
    return checked(read_json(path), kind, str(path), fix=fix)


def parse_record(text: str | bytes, kind: type[T], where: str, *, fix: str) -> T:
    """Read JSON text, such as a file's metadata, as `read_record` does; `where` names its owner."""
    try:
        return checked(parse_json(text), kind, where, fix=fix)
    except ValueError as error:
        raise InputError(f"{where}: {error}", fix=fix) from error


def checked(
    document: Mapping[str, Any],
    kind: type[T],
    where: str,
    *,
    fix: str,
    error: type[DemergeError] = InputError,
) -> T:
    """Return JSON values as a value of a type; for all else see `read_record`."""
    extra: Literal["ignore", "forbid"] = "ignore" if issubclass(kind, Foreign) else "forbid"
    try:
        adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]
        return adapter.validate_json(json.dumps(document), strict=True, extra=extra)
    except ValidationError as refused:
        what, near = _sentence(document, refused, kind)
        raise error(f"{where}: {what}", fix=near or fix) from refused
    except DemergeError as refused:
        raise error(f"{where}: {refused.what}", fix=fix) from refused


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


def _sentence(document: Any, refused: ValidationError, kind: type) -> tuple[str, str]:
    """Return what is wrong first, and the key that an unknown one may have meant."""
    first = refused.errors(include_url=False)[0]
    field, here = "", document
    for part in first["loc"]:  # parts that are no place in the document name a member of a union
        if isinstance(here, dict) and part in here:
            field, here = f"{field}.{part}" if field else str(part), here[part]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            field, here = f"{field}[{part}]", here[part]
    key = str(first["loc"][-1]) if first["loc"] else ""
    inside = f" in {short(field)}" if field else ""
    if first["type"] == "missing":
        return f"the key '{short(key)}' is missing{inside}", ""
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = [*getattr(kind, "model_fields", getattr(kind, "__dataclass_fields__", {}))]
        near = get_close_matches(key, known, 1)
        return f"unknown key '{short(field)}'", f"did you mean '{near[0]}'?" if near else ""
    rule = first["msg"].removeprefix("Value error, ").replace("Input should ", "must ")
    value = short(json.dumps(here, ensure_ascii=False))
    return f"{short(field) or 'the document'}: {rule}, found {value}", ""


def short(text: str) -> str:
    """Return a text of a foreign file as a sentence can hold it."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
