"""What `ranges` says of a stored map, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demerge.analysis.partitioning.options import RangesOptions, parse_cuts
from demerge.analysis.planning.ranges import is_partition, load_map, partition_at, plan
from demerge.analysis.report.summary import ConflictSummary
from demerge.conflict import ConflictMap
from demerge.errors import InputError, UsageError
from demerge.timesteps import Partition

Ranges = Callable[..., ConflictSummary]


@pytest.fixture
def ranges(tmp_path: Path) -> Ranges:
    """Run the stage: ranges(map, **options) -> ConflictSummary."""

    def run(map: ConflictMap, **options: Any) -> ConflictSummary:
        stored = map.save(tmp_path / "map.safetensors")
        return plan(RangesOptions(map=stored, **options)).run().summary

    return run


def test_as_many_ranges_as_planted_are_found(planted: Any, ranges: Ranges) -> None:
    summary = ranges(planted([0, 2, 4, 6, 16], noise=0.2))
    document, text = summary.document(), summary.lines()
    assert document["automatic"] and document["supported"]["ranges"] == document["ranges"] == 4
    assert document["partition"] == [[0, 125], [125, 250], [250, 375], [375, 1000]]
    assert document["taken"] == "gradient"
    table = document["held_out_shares"]
    assert [row["ranges"] for row in table] == list(range(1, 11))
    assert set(table[0]) == {"ranges", "gradient", "uniform", "logsnr"}
    assert table[3]["gradient"]["value"] > table[3]["uniform"]["value"] + 0.1
    json.dumps(document, allow_nan=False)
    assert text[-1] == "ranges        [0, 125) [125, 250) [250, 375) [375, 1000), gradient"
    assert sum(line.endswith("   <") for line in text) == 1
    promise = summary.expected_gain
    assert promise.is_promised and promise.is_held_out and len(promise.ranges) == 4


def test_uniform_is_used_if_it_is_not_beaten(planted: Any, ranges: Ranges) -> None:
    summary = ranges(planted([0, 4, 8, 12, 16], noise=0.15))
    assert (summary.ranges, summary.advice, summary.taken) == (4, "uniform", "uniform")
    promise = summary.expected_gain
    assert promise.is_promised and not promise.is_held_out, "a fixed partition needs no cross-fit"
    assert summary.partition == Partition.uniform(1000, 4)


def test_what_is_asked_for_is_taken(planted: Any, ranges: Ranges) -> None:
    map = planted([0, 2, 4, 6, 16])
    assert ranges(map, ranges=2, method="uniform").partition.cuts == [500]
    assert ranges(map, ranges=3, method="hierarchical", minimum=2).taken == "hierarchical"
    summary = ranges(map, cuts=(125, 500))
    assert (summary.partition.cuts, summary.is_automatic, summary.ranges) == ([125, 500], False, 3)


def test_noise_says_why_and_what_to_do(map_of: Any, ranges: Ranges) -> None:
    summary = ranges(map_of(np.random.default_rng(0).standard_normal((8, 6, 200))))
    document = summary.document()
    assert (summary.ranges, summary.taken, document["held_out_shares"]) == (1, "uniform", [])
    assert document["partition"] == [[0, 1000]]
    assert "noise on 0%" in summary.reason and "Measure about" in summary.lines()[0]
    json.dumps(document, allow_nan=False)


def test_a_plan_says_what_it_reads_and_computes_nothing(planted: Any, tmp_path: Path) -> None:
    stored = planted([0, 4, 8]).save(tmp_path / "map.safetensors")
    made = plan(RangesOptions(map=stored))
    assert "8 bins of [0, 1000)" in made.describe()[0] and made.cost().steps == 1
    assert "bins" not in vars(made.reading)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranges": 17}, "17 ranges, and the map has 16 bins"),
        ({"ranges": 0}, "at least 1"),
        ({"ranges": 4, "minimum": 5}, "4 ranges of 5 bins"),
        ({"minimum": 0}, "at least 1"),
        ({"method": "best"}, "advised, gradient, hierarchical, uniform, logsnr"),
        ({"score": "sum"}, "step, energy, cosine"),
        ({"cuts": (500,), "method": "uniform"}, "leave out --method and --ranges"),
        ({"cuts": (500,), "ranges": 4}, "2 ranges"),
    ],
)
def test_wrong_options_are_usage_errors(
    planted: Any, ranges: Ranges, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        ranges(planted([0, 8, 16]), **options)
    assert message in str(error.value) and error.value.fix


def test_lists_of_cuts() -> None:
    assert parse_cuts(" 125, 500 ") == (125, 500)
    assert partition_at((999,), 1000).cuts == [999]
    with pytest.raises(UsageError, match="do not ascend within"):
        partition_at((5, 1000), 1000)


@pytest.mark.parametrize("text", ["", "a", "125,", "1.5", "500,125", "0,5", "5,5", "-3", "٣"])
def test_what_is_not_a_list_of_cuts(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_cuts(text)
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


def test_a_partition_is_told_from_other_files(tmp_path: Path) -> None:
    Partition.uniform(10, 2).save(tmp_path / "old.json")
    (tmp_path / "other").write_bytes(b"x")
    assert is_partition(tmp_path / "old.json") and not is_partition(tmp_path / "other")
