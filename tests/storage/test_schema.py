"""One reader for all records: strict types, no key too many, capped in size and depth, one sentence for a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from demerge.errors import InputError, UsageError
from demerge.expert import Expert, list_experts
from demerge.storage.safetensors_header import MAX_DEPTH, MAX_HEADER, read_json
from demerge.storage.schema import Count, Foreign, Record, checked, parse_record, read_record
from demerge.timesteps import TimestepRange


class Note(Record):
    kind: Literal["a", "b"]
    count: Count = 0
    share: float = 0.5
    either: bool | tuple[int, ...] = True


@dataclass(frozen=True, slots=True)
class Value:
    name: str

    def __post_init__(self) -> None:
        if not self.name:
            raise UsageError("a name is empty", fix="give one")


class Config(Foreign):
    sample_size: int


def sentence(document: Any, kind: type = Note) -> str:
    with pytest.raises(InputError) as refused:
        checked(document, kind, "FILE", fix="FIX")
    assert refused.value.fix
    return refused.value.what


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"kind": "c"}, "FILE: kind: must be 'a' or 'b', found \"c\""),
        ({"count": True}, "FILE: count: must be a valid integer, found true"),
        ({"count": "8"}, 'FILE: count: must be a valid integer, found "8"'),
        ({"count": 1.0}, "FILE: count: must be a valid integer, found 1.0"),
        ({"count": -1}, "FILE: count: must be greater than or equal to 0, found -1"),
        ({"share": "1"}, 'FILE: share: must be a valid number, found "1"'),
        ({"share": False}, "FILE: share: must be a valid number, found false"),
        ({"either": [1, "x"]}, 'FILE: either: must be a valid boolean, found [1, "x"]'),
        ({"cuont": 1}, "FILE: unknown key 'cuont'"),
        ({"count": "x" * 1000}, f'FILE: count: must be a valid integer, found "{"x" * 56}...'),
    ],
)
def test_a_failure_is_one_sentence(changes: dict[str, Any], what: str) -> None:
    assert sentence({"kind": "a", **changes}) == what


def test_keys_are_named() -> None:
    assert sentence({}) == "FILE: the key 'kind' is missing"
    with pytest.raises(InputError) as refused:
        checked({"kind": "a", "cuont": 1}, Note, "FILE", fix="FIX")
    assert refused.value.fix == "did you mean 'count'?"


def test_whole_numbers_are_numbers_and_a_dataclass_is_a_format() -> None:
    assert checked({"kind": "a", "share": 1, "either": [1, 2]}, Note, "", fix="") == Note(
        kind="a", share=1.0, either=(1, 2)
    )
    assert checked({"name": "x"}, Value, "", fix="") == Value("x")
    assert sentence({"name": ""}, Value) == "FILE: a name is empty"
    assert "unknown key" in sentence({"name": "x", "more": 1}, Value)


def test_foreign_records_may_hold_more() -> None:
    assert checked({"sample_size": 8, "_class_name": []}, Config, "", fix="").sample_size == 8
    assert (
        sentence({"sample_size": None}, Config)
        == "FILE: sample_size: must be a valid integer, found null"
    )


TEXTS = {
    "nothing": "",
    "a list": "[]",
    "half": '{"kind": "a"',
    "NaN": '{"kind": "a", "share": NaN}',
    "infinity": '{"kind": "a", "share": -Infinity}',
    "an overflow": '{"kind": "a", "share": 1e400}',
    "a long number": '{"kind": "a", "count": %s}' % ("9" * 5000),
    "twice": '{"kind": "a", "kind": "b"}',
    "half of a pair": '{"kind": "\\ud800"}',
    "NUL": '{"kind": "a\\u0000"}',
    "deep": '{"kind": %s}' % ("[" * 40 + "]" * 40),
    "very deep": '{"kind": ' + "[" * 1_000_000,
    "not UTF-8": b'{"kind": "\xff"}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_is_not_strict_json_is_refused(tmp_path: Path, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    (tmp_path / "note.json").write_bytes(data)
    with pytest.raises(InputError, match=r"note\.json") as refused:
        read_record(tmp_path / "note.json", Note, fix="FIX")
    assert len(str(refused.value)) < 500 + len(str(tmp_path))
    with pytest.raises(InputError, match="metadata"):
        parse_record(data, Note, "metadata", fix="FIX")


def test_pairs_of_surrogates_are_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"name": "\\ud83d\\ude00"}')
    assert read_record(tmp_path / "x.json", Value, fix="").name == "\N{GRINNING FACE}"


def test_size_and_depth_are_capped(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"{" + b" " * MAX_HEADER + b"}")
    with pytest.raises(InputError, match="larger than 16 MB"):
        read_json(path)
    path.write_text(
        '{"a": ' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + ', "b": "' + "[" * 100 + '"}'
    )
    assert read_json(path)["b"] == "[" * 100


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "absent"):
        with pytest.raises(InputError):
            read_json(path)


def test_experts_of_a_folder_lie_in_it(tmp_path: Path) -> None:
    for name, span in (("b", [0, 5]), ("a", [5, 9])):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "expert.json").write_text(json.dumps({"range": span}))
    found = list_experts(tmp_path / "run")
    assert [(span, path.name) for span, path in found.items()] == [
        (TimestepRange(0, 5), "b"),
        (TimestepRange(5, 9), "a"),
    ]
    assert Expert.load(tmp_path / "run" / "a" / "expert.json").span == TimestepRange(5, 9)
    (tmp_path / "run" / "c").mkdir()
    (tmp_path / "elsewhere.json").write_text('{"range": [0, 9]}')
    (tmp_path / "run" / "c" / "expert.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match="leads out of"):
        list_experts(tmp_path / "run")


def test_help_does_not_import_pydantic() -> None:
    code = "import sys, demerge, demerge.cli.main; print([m for m in ('pydantic', 'torch') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
