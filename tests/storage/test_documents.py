"""Documents in YAML, TOML and JSON: plain tables only."""

from __future__ import annotations

from pathlib import Path

import pytest

from demerge.errors import InputError, UsageError
from demerge.storage.documents import check_known_keys, read_document, read_rows, typed


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.yaml", "steps: 3\n"), ("a.toml", "steps = 3\n"), ("a.json", '{"steps": 3}')],
)
def test_all_formats_give_one_table(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_document(tmp_path / name) == {"steps": 3}


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a: &x 1", "a: !!str 1", "[" * 20, "- 1", "\xff"])
def test_odd_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError):
        read_document(tmp_path / "a.yaml")


def test_keys_and_kinds_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown key 'step'") as caught:
        check_known_keys({"step": 1}, ["steps"], "here")
    assert caught.value.fix == "did you mean 'steps'?"
    with pytest.raises(UsageError, match="steps is 'True'"):
        typed({"steps": True}, "steps", int, "here")
    (tmp_path / "a.csv").write_text("x,y\n1,2\n\n")
    assert read_rows(tmp_path / "a.csv") == [["1", "2"]]


def test_words_that_older_yaml_takes_for_switches_stay_words(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("mixed_precision: no\nantithetic: off\nlayers: true\nnote: trueish\n")
    words = {"mixed_precision": "no", "antithetic": "off", "layers": True, "note": "trueish"}
    assert read_document(path, words=True) == words


def test_recipes_keep_the_switches_of_older_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("no_base: on\nskip_text_encoder: yes\nnormalize: no\n")
    assert read_document(path) == {"no_base": True, "skip_text_encoder": True, "normalize": False}
