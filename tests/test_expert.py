"""The Expert: one reader and one writer of expert.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from demerge.errors import InputError
from demerge.expert import (
    Expert,
    find_expert,
    find_expert_range,
    find_noise_side,
    list_experts,
)
from demerge.inspection import inspect_model
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


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("875,1000", TimestepRange(875, 1000)),
        ("0,999", TimestepRange(0, 1000)),
        ("0000-0875", TimestepRange(0, 875)),
        ("all", None),
        ("900,900", None),
    ],
)
def test_the_range_of_a_plain_file_is_in_its_metadata(
    tmp_path: Path, text: str, span: TimestepRange | None
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({"a": torch.ones(1)}, file, {"modelspec.timestep_range": text})
    assert find_expert_range(locate(file)) == span
    Expert(range=(0, 250)).save(tmp_path / "expert.json")
    assert find_expert_range(locate(file)) == TimestepRange(0, 250)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("style_high_noise.safetensors", "high"),
        ("wan2.2_t2v_low_noise_14B_fp16.safetensors", "low"),
        ("Style-HighNoise.safetensors", "high"),
        ("low_noise_model/model.safetensors", "low"),
        ("low_noise_model/from_high_noise.safetensors", "high"),
        ("high_noise_to_low_noise.safetensors", None),
        ("highlands_noise.safetensors", None),
    ],
)
def test_the_noise_side_is_in_the_name(tmp_path: Path, name: str, side: str | None) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    save_file({"a": torch.ones(1)}, file)
    assert find_noise_side(locate(file)) == side
    assert inspect_model(file).noise == side
