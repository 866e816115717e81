"""The Expert: one reader and one writer of expert.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demerge.errors import InputError
from demerge.expert import Expert, find_expert, list_experts
from demerge.storage.layout import locate
from demerge.timesteps import TimestepRange


def test_an_expert_is_written_and_read(tmp_path: Path) -> None:
    expert = Expert(range=(0, 250), steps=3, inputs={"data": "digits"}, train_layers=("a",))
    path = expert.save(tmp_path / "expert.json")
    assert Expert.load(path) == Expert.load(str(tmp_path)) == expert
    assert expert.span == TimestepRange(0, 250) and repr(expert) == "Expert(0000-0250, 3 steps)"
    assert list(json.loads(path.read_text())) == list(Expert.model_fields)


def test_a_record_with_an_older_name_of_an_option_is_read(tmp_path: Path) -> None:
    record = {"range": [0, 250], "options": {"p": 0.25, "seed": 0}}
    (tmp_path / "expert.json").write_text(json.dumps(record))
    assert Expert.load(tmp_path).options == {"global_prob": 0.25, "seed": 0}


def test_experts_are_found_next_to_weights(tmp_path: Path, tiny: Path) -> None:
    assert find_expert(locate(tiny)) is None
    for start in (500, 0):
        Expert(range=(start, start + 500)).save(tmp_path / f"e{start}" / "expert.json")
    assert [span.start for span in list_experts(str(tmp_path))] == [0, 500]
    with pytest.raises(InputError, match=r"no expert\.json"):
        list_experts(tmp_path / "e0")
