"""Pipelines of two denoisers: which expert is for which side of the boundary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from demerge.errors import InputError, UsageError
from demerge.expert import SPEC_RANGE, find_expert_range
from demerge.merging import merge
from demerge.merging.inputs.denoisers import (
    Denoiser,
    assign_experts,
    find_denoisers,
    make_pair_index,
)
from demerge.storage.layout import locate
from demerge.timesteps import TimestepRange

HIGH, LOW = TimestepRange(875, 1000), TimestepRange(0, 875)
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(name, folders, boundary) -> a pipeline folder with those denoisers."""

    def pipeline(
        name: str, folders: tuple[str, ...] = ("transformer",), boundary: Any = None, T: Any = 1000
    ) -> Path:
        folder = tmp_path / name
        for part in folders:
            (folder / part).mkdir(parents=True)
            save_file({"a": torch.ones(1)}, folder / part / "diffusion_pytorch_model.safetensors")
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(
            json.dumps({"num_train_timesteps": T})
        )
        index = {
            "_class_name": "WanPipeline",
            "transformer": ["diffusers", "X"],
            "transformer_2": [None, None],
        }
        index |= {part: ["diffusers", "X"] for part in folders} | {"boundary_ratio": boundary}
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return pipeline


@pytest.fixture
def two(make: Make) -> Path:
    return make("two", ("transformer", "transformer_2"), 0.875)


def of(path: Path) -> list[Denoiser]:
    return find_denoisers(locate(path))


def taken(
    base: Path,
    experts: list[Path],
    ranges: list[TimestepRange | None],
    boundary: float | None = None,
) -> Any:
    """What each denoiser of the output is merged from: {folder: [(number, name), ...]}."""
    found = assign_experts(of(base), [of(e) for e in experts], ranges, boundary)
    return {task.folder.as_posix(): [(i, d.name) for i, d in task.experts] for task in found}


def test_a_pipeline_has_one_denoiser_or_two_with_their_ranges(make: Make, two: Path) -> None:
    assert [(d.name, d.range) for d in of(two)] == [("transformer", HIGH), ("transformer_2", LOW)]
    assert [(d.name, d.range) for d in of(make("one"))] == [("transformer", None)]
    assert [(d.name, d.range) for d in of(two / "transformer_2")] == [("transformer_2", LOW)]
    assert [(d.name, d.range) for d in of(two / "transformer")] == [("transformer", HIGH)]
    file = two / "transformer_2" / "diffusion_pytorch_model.safetensors"
    assert [(d.name, d.range) for d in of(file)] == [("", None)]


def test_two_are_two_experts_of_a_base_of_one(make: Make, two: Path) -> None:
    base, other = make("base"), make("other")
    assert taken(base, [other, two], [None, None]) == {
        "transformer": [(0, "transformer"), (1, "transformer"), (1, "transformer_2")]
    }
    [task] = assign_experts(of(base), [of(two)], [None])
    assert [d.range for _, d in task.experts] == [HIGH, LOW] and task.range is None


def test_two_and_two_are_merged_with_their_counterparts(make: Make, two: Path) -> None:
    other = make("other", ("transformer", "transformer_2"), 0.875)
    assert taken(two, [other], [None]) == {
        "transformer": [(0, "transformer")],
        "transformer_2": [(0, "transformer_2")],
    }
    assert taken(two / "transformer_2", [other], [None]) == {".": [(0, "transformer_2")]}


def test_an_expert_goes_to_the_sides_that_its_range_reaches(make: Make, two: Path) -> None:
    one = make("one")
    assert taken(two, [one, one], [TimestepRange(900, 1000), TimestepRange(500, 900)]) == {
        "transformer": [(0, "transformer"), (1, "transformer")],
        "transformer_2": [(1, "transformer")],
    }
    assert taken(two, [two / "transformer_2"], [None]) == {
        "transformer": [],
        "transformer_2": [(0, "transformer_2")],
    }


def test_a_file_goes_to_the_side_that_its_name_or_its_metadata_says(
    two: Path, tmp_path: Path
) -> None:
    high, low = (
        tmp_path / "style_high_noise.safetensors",
        tmp_path / "HighNoise-LowNoise.safetensors",
    )
    folder = tmp_path / "low_noise_model"
    folder.mkdir()
    for file in (high, low, folder / "a.safetensors"):
        save_file({"a": torch.ones(1)}, file)
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors", {SPEC_RANGE: "900,1000"})
    experts = [high, folder, folder / "a.safetensors", tmp_path / "b.safetensors"]
    ranges = [find_expert_range(locate(path)) for path in experts]
    assert ranges == [None, None, None, TimestepRange(900, 1000)]
    assert taken(two, experts, ranges) == {
        "transformer": [(0, ""), (3, "")],
        "transformer_2": [(1, "low_noise_model"), (2, "")],
    }
    with pytest.raises(UsageError, match="cannot tell which"):
        taken(two, [low], [None])
    assert taken(two / "transformer", [high], [None]) == {".": [(0, "")]}


def test_a_boundary_makes_two_of_one(make: Make, two: Path) -> None:
    base, experts = make("base"), [make("a"), make("b"), two]
    assert taken(base, experts, [TimestepRange(0, 500), TimestepRange(875, 1000), None], 0.875) == {
        "transformer": [(1, "transformer"), (2, "transformer")],
        "transformer_2": [(0, "transformer"), (2, "transformer_2")],
    }
    index = make_pair_index(locate(base), 0.875)
    assert index["transformer_2"] == index["transformer"] and index["boundary_ratio"] == 0.875


def test_refuses_what_has_no_side(make: Make, two: Path, tmp_path: Path) -> None:
    base, one = make("base"), make("one")
    with pytest.raises(UsageError, match="cannot tell which"):
        taken(two, [one], [None])
    with pytest.raises(UsageError, match="no expert reaches"):
        taken(base, [one], [TimestepRange(0, 100)], 0.5)
    with pytest.raises(UsageError, match="two denoisers already"):
        taken(two, [two], [None], 0.5)
    with pytest.raises(UsageError, match="changes its denoiser"):
        taken(make("other", ("transformer", "transformer_2"), 0.9), [two], [None])
    for boundary in (0.0, 1.0, -1.0, 2.0):
        with pytest.raises(UsageError, match="without timesteps"):
            taken(base, [one], [HIGH], boundary)
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="not a pipeline"):
        make_pair_index(locate(tmp_path / "a.safetensors"), 0.5)


def test_refuses_a_range_for_two(make: Make, two: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"two denoisers with ranges of their own; the range 0000-0500",
    ):
        merge(
            make("one"), [two], tmp_path / "out", method="average", ranges=[TimestepRange(0, 500)]
        )


@pytest.mark.parametrize("boundary", [None, "0.5", 0, 1.5, True, float("nan"), [0.5]])
def test_refuses_a_boundary_that_is_none(make: Make, boundary: Any) -> None:
    with pytest.raises(InputError, match=r"boundary_ratio|NaN is not a finite number"):
        of(make("two", ("transformer", "transformer_2"), boundary))


@pytest.mark.parametrize("T", [None, "1000", 0, 2**40])
def test_refuses_a_scheduler_without_timesteps(make: Make, T: Any) -> None:
    with pytest.raises(InputError, match="num_train_timesteps"):
        of(make("two", ("transformer", "transformer_2"), 0.5, T))
