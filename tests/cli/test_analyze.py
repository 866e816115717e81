"""`demerge analyze`: what scripts rely on, what is kept between calls, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demerge.conflict import ConflictMap
from demerge.timesteps import Partition

SMALL = ("--data", "digits", "--bins", 6, "--groups", 5, "--batch-size", 2, "--device", "cpu")


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out plots and page, which take most of the time."""

    def write(*arguments: Any, **names: Any) -> list[Path]:
        return []

    monkeypatch.setattr("demerge.analysis.report.page.write_report", write)


def test_analyze_as_scripts_call_it(run: Any, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "conflict"
    done = run("analyze", tiny, *SMALL, "--ranges", 3, "-o", out)
    assert (done.code, done.out.strip()) == (0, str(out))
    assert "30 backward passes" in done.err and "advice" in done.err
    assert ConflictMap.load(out / "conflict.safetensors").N == 6
    assert len(Partition.load(out / "partition.json")) == 3
    kinds = {".safetensors", ".json", ".svg", ".png", ".html", ".yaml"}
    assert {path.suffix for path in out.iterdir()} == kinds


@pytest.mark.usefixtures("no_files")
def test_a_stored_map_is_only_partitioned_anew(run: Any, tiny: Path, tmp_path: Path) -> None:
    assert run("analyze", tiny, *SMALL, "--ranges", 3, "-o", tmp_path).code == 0
    kept = (tmp_path / "conflict.safetensors").read_bytes()
    uniform = ("--ranges", 2, "--method", "uniform", "--json")
    again = run("analyze", tiny, *SMALL, *uniform, "-o", tmp_path)
    document = json.loads(again.out)
    assert document["taken"] == "uniform" and document["cuts"]["uniform"]["cuts"] == [500]
    assert "exists already" in again.err
    assert (tmp_path / "conflict.safetensors").read_bytes() == kept
    auto = ("--ranges", "auto", "--method", "hierarchical", "--json")
    counted = json.loads(run("analyze", tiny, *SMALL, *auto, "-o", tmp_path).out)
    assert counted["ranges"] == len(counted["cuts"][counted["taken"]]["cuts"]) + 1
    other = run("analyze", tiny, *SMALL, "--seed", 1, "-o", tmp_path)
    assert other.code == 2 and "seed was 0, now 1" in other.err


@pytest.mark.usefixtures("no_files")
def test_ranges_of_ones_own_are_judged_and_bins_cut_there(
    run: Any, tiny: Path, tmp_path: Path
) -> None:
    mine, out = Partition.from_cuts(1000, [875]), tmp_path / "out"
    done = run("analyze", tiny, *SMALL, "--ranges", "0:875,875:1000", "-o", out, "--json")
    document = json.loads(done.out)
    assert (done.code, document["taken"], document["verdict"]["method"]) == (0, "given", "given")
    assert document["verdict"]["found"] in done.err and "ne model will do" in done.err
    map = ConflictMap.load(out / "conflict.safetensors")
    assert map.bins.cuts == [175, 350, 525, 700, 875]
    mine.save(tmp_path / "partition.json")
    more = ("--ranges", tmp_path / "partition.json", "--groups", 6)
    assert run("analyze", tiny, *SMALL, *more, "-o", out).code == 0
    extended = ConflictMap.load(out / "conflict.safetensors")
    assert (extended.M, extended.bins) == (6, map.bins)
    assert run("analyze", tiny, *SMALL[:-2], "--groups", 6, "--ranges", 2, "-o", out).code == 0
    other = run("analyze", tiny, *SMALL, "--groups", 6, "--ranges", "0:800,800:1000", "-o", out)
    assert other.code == 2 and "cut at 800\n  fix: choose another folder" in other.err


@pytest.mark.usefixtures("no_files")
def test_a_config_file_gives_the_same_run(run: Any, tiny: Path, tmp_path: Path) -> None:
    given = ("--ranges", 2, "--budget", "1h", "--antithetic", "on", "-o", tmp_path / "a", "--json")
    first = run("analyze", tiny, *SMALL, *given)
    config = ("--config", tmp_path / "a" / "analyze.yaml", "-o", tmp_path / "b", "--json")
    second = run("analyze", tiny, *config)
    assert (first.code, second.code) == (0, 0), second.err
    maps = [ConflictMap.load(tmp_path / name / "conflict.safetensors") for name in "ab"]
    assert maps[0].origin == maps[1].origin and maps[1].origin.antithetic is True


@pytest.mark.usefixtures("no_files")
def test_sketches_of_chosen_parameters(run: Any, tiny: Path, tmp_path: Path) -> None:
    given = ("--ranges", 2, "--engine", "sketch", "--params", "attentions", "--budget", "1h")
    done = run("analyze", tiny, *SMALL, *given, "-o", tmp_path / "out")
    assert done.code == 0 and "sketches of 65,521 numbers" in done.err, done.err
    assert "30 backward passes, about" in done.err
    origin = ConflictMap.load(tmp_path / "out" / "conflict.safetensors").origin
    assert (origin.engine, origin.params) == ("sketch-65521", "attentions")
    other = run("analyze", tiny, *SMALL, "--ranges", 2, "--engine", "exact", "-o", tmp_path / "out")
    assert other.code == 2 and "engine was 'sketch-65521', now 'exact'" in other.err


def test_a_damaged_map_is_refused_before_anything_is_measured(
    run: Any, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "conflict.safetensors").write_bytes(b"x")
    done = run("analyze", tiny, *SMALL, "-o", tmp_path)
    assert done.code == 3 and "not a conflict map" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["conflict.safetensors"]


@pytest.mark.usefixtures("no_files")
def test_the_document_names_the_files_of_the_fisher(run: Any, tiny: Path, tmp_path: Path) -> None:
    for _ in range(2):
        done = run(
            "analyze",
            tiny,
            *SMALL,
            "--ranges",
            2,
            "--fisher",
            "uniform:2",
            "-o",
            tmp_path / "out",
            "--json",
        )
        assert done.code == 0, done.err
        files = [Path(name) for name in json.loads(done.out)["files"]]
        assert files[-2:] == [
            tmp_path / "out" / "fisher" / name / "fisher.safetensors"
            for name in ("0000-0500", "0500-1000")
        ]
        assert all(path.is_file() for path in files)
    assert "nothing" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--method", "best"), 2, "'gradient', 'hierarchical', 'uniform', 'logsnr'"),
        (("--draws", "none"), 2, "'shared', 'independent'"),
        (("--engine", "some"), 2, "'auto', 'exact', 'sketch'"),
        (("--params", "nowhere"), 2, "fits none"),
        (("--ranges", 7), 2, "ranges <= bins"),
        (("--ranges", 0), 2, "at least 1"),
        (("--ranges", "some"), 2, "auto"),
        (("--bins", 2000), 2, "bins"),
        (("--groups", 4), 2, "at least 5"),
        (("--memory", 0.001, "--bins", 1000, "--groups", 50), 4, "take fewer bins or groups"),
        (("--data", "nowhere"), 3, "nowhere"),
        (("--antithetic", "auto", "--batch-size", 3), 2, "even"),
        (("--antithetic", "maybe"), 2, "'off', 'on', 'auto'"),
        (("--budget", "10"), 2, "90s, 10m or 2h"),
        (("--budget", "0.001s"), 4, "give --budget"),
        (("--target-se", 0), 2, "above 0"),
        (("--mixed-precision", "fp8"), 2, "'no', 'bf16'"),
        (("--fisher", "uniform:2", "--budget", "0.001s"), 4, "give --budget"),
        (("--fisher", "uniform:2", "--mixed-precision", "bf16"), 2, "leave out --mixed-precision"),
    ],
)
def test_mistakes_end_in_one_message(
    run: Any, tiny: Path, tmp_path: Path, arguments: tuple[Any, ...], code: int, message: str
) -> None:
    done = run("analyze", tiny, *SMALL, *arguments, "-o", tmp_path / "out")
    assert (done.code, message in done.err) == (code, True), done.err
    assert not (tmp_path / "out").exists()
