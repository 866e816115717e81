"""What `ranges` says of a stored map, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demerge.analysis.stages.ranges import check_replaceable, given_cuts, lines, load_map, ranges
from demerge.errors import InputError, UsageError
from demerge.timesteps import Partition


def test_as_many_ranges_as_planted_where_they_are_planted(planted: Any) -> None:
    said = ranges(planted([0, 2, 4, 6, 16], noise=0.2))
    assert said["automatic"] and said["supported"]["ranges"] == said["ranges"] == 4
    assert (
        said["partition"] == [[0, 125], [125, 250], [250, 375], [375, 1000]]
        and said["taken"] == "gradient"
    )
    table = said["held_out_shares"]
    assert [row["ranges"] for row in table] == list(range(1, 11)) and set(table[0]) == {
        "ranges",
        "gradient",
        "uniform",
        "logsnr",
    }
    assert table[3]["gradient"]["value"] > table[3]["uniform"]["value"] + 0.1
    json.dumps(said, allow_nan=False)
    text = lines(said)
    assert text[-1] == "ranges        [0, 125) [125, 250) [250, 375) [375, 1000), gradient"
    assert sum(line.endswith("   <") for line in text) == 1
    assert (
        said["benefit"]["promised"]
        and said["benefit"]["held_out"]
        and len(said["benefit"]["ranges"]) == 4
    )


def test_uniform_is_used_where_it_is_not_beaten(planted: Any) -> None:
    said = ranges(planted([0, 4, 8, 12, 16], noise=0.15))
    assert (said["ranges"], said["advice"], said["taken"]) == (4, "uniform", "uniform")
    assert said["benefit"]["promised"] and not said["benefit"]["held_out"], (
        "a cut that was not found needs no cross-fit"
    )
    assert said["partition"] == [[0, 250], [250, 500], [500, 750], [750, 1000]]


def test_what_is_asked_for_is_taken(planted: Any) -> None:
    map = planted([0, 2, 4, 6, 16])
    assert ranges(map, 2, method="uniform")["partition"] == [[0, 500], [500, 1000]]
    assert ranges(map, 3, method="hierarchical", minimum=2)["taken"] == "hierarchical"
    said = ranges(map, given=Partition.from_cuts(1000, [125, 500]))
    assert (
        said["partition"] == [[0, 125], [125, 500], [500, 1000]]
        and not said["automatic"]
        and said["ranges"] == 3
    )


def test_noise_says_why_and_what_to_do(map_of: Any) -> None:
    said = ranges(map_of(np.random.default_rng(0).standard_normal((8, 6, 200))))
    assert (said["ranges"], said["taken"], said["partition"], said["held_out_shares"]) == (
        1,
        "uniform",
        [[0, 1000]],
        [],
    )
    assert "resolved on 0%" in said["reason"] and "Measure about" in lines(said)[0]
    json.dumps(said, allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 17}, "17 ranges, and the map has 16 bins"),
        ({"n": 0}, "0 ranges"),
        ({"n": 4, "minimum": 5}, "4 ranges of 5 bins"),
        ({"minimum": 0}, "0 bins"),
        ({"method": "best"}, "advised, gradient, hierarchical, uniform, logsnr"),
        ({"score": "sum"}, "step, energy, cosine"),
    ],
)
def test_wrong_arguments_are_usage_errors(
    planted: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        ranges(planted([0, 8, 16]), **arguments)
    assert message in str(error.value) and error.value.fix


def test_lists_of_cuts() -> None:
    assert given_cuts(" 125, 500 ", 1000).cuts == [125, 500]
    assert given_cuts("999", 1000).cuts == [999]


@pytest.mark.parametrize(
    "text", ["", "a", "125,", "1.5", "500,125", "0,5", "5,1000", "5,5", "-3", "٣"]
)
def test_what_is_no_list_of_cuts(text: str) -> None:
    with pytest.raises(UsageError) as error:
        given_cuts(text, 1000)
    assert "--cuts 125,500" in error.value.fix


def test_maps_are_found_in_their_folder_and_held_against_a_model(
    planted: Any, tiny: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    from demerge.analysis.measurement.schedule import log_snr
    from demerge.diffusion.model import Diffusion
    from demerge.storage.checkpoint import Checkpoint, content_sha256

    map = planted([0, 4, 8])
    map.save(tmp_path / "conflict.safetensors")
    assert np.array_equal(load_map(tmp_path).gram, load_map(tmp_path / "conflict.safetensors").gram)
    with pytest.raises(InputError, match="measured on a model of sha256 model"):
        load_map(tmp_path, str(tiny))
    own = replace(map, origin=replace(map.origin, model=content_sha256(Checkpoint.open(tiny))))
    own.save(tmp_path / "other")
    with pytest.raises(
        InputError, match=r"measured on a schedule of 1000 timesteps with log SNR 9\.00"
    ):
        load_map(tmp_path / "other", str(tiny))
    replace(own, log_snr=log_snr(Diffusion.load(str(tiny)))).save(tmp_path / "own")
    assert load_map(tmp_path / "own", str(tiny)).origin == own.origin


def test_only_a_partition_is_replaced(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new")
    Partition.uniform(10, 2).save(tmp_path / "old.json")
    check_replaceable(tmp_path / "old.json")
    (tmp_path / "other").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "other"):
        with pytest.raises(UsageError, match="is not a partition"):
            check_replaceable(path)
