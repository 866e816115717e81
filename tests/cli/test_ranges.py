"""`demerge ranges`: what scripts rely on, that the map alone is enough, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demerge.analysis.report.page import CAPTIONS
from demerge.conflict import ConflictMap, Origin
from demerge.reporting.theme import Pictures
from demerge.timesteps import Partition

PLOTS = "demerge.analysis.report.page.draw_plots"  # which take most of the time
DRAWN = dict.fromkeys(CAPTIONS, Pictures(b"<svg/>", b"<svg/>", b""))


@pytest.fixture
def conflict(tmp_path: Path) -> Path:
    """A stored map of 16 bins whose gradients turn at 125, 250 and 375."""
    rng, directions = np.random.default_rng(0), np.repeat(np.eye(4, 12), [2, 2, 2, 10], axis=0)
    s = directions[:, None] + 0.2 * rng.standard_normal((16, 8, 12))
    origin = Origin("model", "data", 12, "exact", "shared", False, "euclid", 4, 0)
    gram = np.einsum("imd,jnd->imjn", s, s)
    return ConflictMap(Partition.uniform(1000, 16), gram, np.linspace(9, -10, 1000), origin).save(
        tmp_path / "conflict.safetensors"
    )


def test_ranges_as_scripts_call_it(
    run: Any, conflict: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("ranges", conflict)
    assert (done.code, done.out) == (0, "0:125 125:250 250:375 375:1000\n")
    for word in (
        "by cross-fit",
        "held out",
        "bootstrap",
        "logsnr",
        "benefit       a joint AdamW step",
        "advice        gradient",
    ):
        assert word in done.err
    out = tmp_path / "new" / "partition.json"
    wrote = run("ranges", tmp_path, "--ranges", "auto", "-o", out)
    assert (wrote.code, wrote.out.strip()) == (0, str(out)) and Partition.load(out).cuts == [
        125,
        250,
        375,
    ]
    page = (out.parent / "conflict.html").read_text(encoding="utf-8")
    assert (
        "125, 250 and 375 into 4 ranges" in page and f"--ranges {out}" in page and "joint:4" in page
    )
    monkeypatch.setattr(PLOTS, lambda summary: DRAWN)
    said = json.loads(
        run("ranges", conflict, "--ranges", 2, "--method", "hierarchical", "-o", out, "--json").out
    )
    assert said["ranges"] == 2 and said["taken"] == "hierarchical" and len(Partition.load(out)) == 2
    assert said["partition"] == [[r.start, r.stop] for r in Partition.load(out)]
    assert said["page"] == str(out.parent / "conflict.html") and said["benefit"]["promised"]


def test_one_range_says_why_there_are_no_more(run: Any, conflict: Path) -> None:
    done = run("ranges", conflict, "--ranges", 1, "--minimum", 16)
    assert (
        done.code,
        "supported     1: 16 blocks of bins give no 2 ranges of 16 bins or more" in done.err,
    ) == (0, True)


def test_a_list_of_cuts_is_judged_and_written(
    run: Any, conflict: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PLOTS, lambda summary: DRAWN)
    done = run(
        "ranges",
        conflict,
        "--cuts",
        "100,500",
        "--ranges",
        3,
        "--score",
        "cosine",
        "-o",
        tmp_path / "p.json",
        "--json",
    )
    said = json.loads(done.out)
    assert (done.code, said["taken"], said["ranges"], said["score"]) == (0, "given", 3, "cosine")
    assert Partition.load(tmp_path / "p.json").cuts == said["cuts"]["given"]["cuts"] == [100, 500]
    for text in ("500:1000,0:100,100:500", tmp_path / "p.json"):
        again = json.loads(
            run("ranges", conflict, "--ranges", text, "--score", "cosine", "--json").out
        )
        assert again["cuts"] == said["cuts"] and again["verdict"] == said["verdict"]
    assert said["verdict"]["found"].startswith("Three experts are worth it")


def test_the_model_is_checked_where_it_is_named(run: Any, conflict: Path, tiny: Path) -> None:
    done = run("ranges", conflict, "--model", tiny)
    assert (done.code, "measured on a model of sha256 model..." in done.err) == (3, True)
    assert run("ranges", conflict, "--model", "nowhere/at-all").code == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--ranges", 17), 2, "17 ranges, and the map has 16 bins"),
        (
            ("--ranges", "many"),
            2,
            "'many' are neither uniform:N, joint, START:STOP,..., a number, auto",
        ),
        (("--ranges", "0:500"), 2, "0:500 covers 500 timesteps, the base has 1000"),
        (("--ranges", "0:500,600:1000"), 2, "leave a gap"),
        (("--ranges", "0:500,500:1000", "--method", "uniform"), 2, "leave out --method"),
        (("--ranges", "0:500,500:1000", "--cuts", "500"), 2, "leave out --method and --cuts"),
        (("--ranges", 0), 2, "at least 1"),
        (("--minimum", 9, "--ranges", 2), 2, "2 ranges of 9 bins"),
        (
            ("--minimum", 9),
            2,
            "minimum 9: 2 ranges of 9 bins or more do not fit the map's 16 bins",
        ),
        (("--minimum", 5, "--ranges", 4), 2, "fix: give 1 <= minimum <= 4\n"),
        (("--minimum", 0), 2, "minimum is 0"),
        (("--method", "best"), 2, "hierarchical"),
        (("--score", "sum"), 2, "'step', 'energy', 'cosine'"),
        (("--cuts", "500,125"), 2, "ascend"),
        (("--cuts", "125", "--ranges", 4), 2, "2 ranges"),
        (("--cuts", "125", "--method", "uniform"), 2, "leave out --method"),
        (("-o", "."), 2, "is not a partition"),
        (("-o", "conflict.safetensors"), 2, "is not a partition"),
        (("-o", "conflict.safetensors/p.json"), 2, "cannot exist"),
        (("--cuts", "125,125"), 2, "ascend"),
        (("--cuts", "125,1000"), 2, "ascend"),
        (("--cuts", "125,"), 2, "not a list of timesteps"),
    ],
)
def test_mistakes_end_in_one_message(
    run: Any,
    conflict: Path,
    arguments: tuple[Any, ...],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(conflict.parent)
    before = conflict.read_bytes()
    done = run("ranges", conflict, *arguments)
    assert (done.code, message in done.err, done.out) == (code, True, ""), done.err
    assert [path.name for path in conflict.parent.iterdir()] == [
        conflict.name
    ] and conflict.read_bytes() == before


def test_a_page_of_ones_own_is_kept(run: Any, conflict: Path, tmp_path: Path) -> None:
    page = tmp_path / "conflict.html"
    page.write_text("mine")
    done = run("ranges", conflict, "-o", tmp_path / "p.json")
    assert (done.code, "is not a page of a conflict map" in done.err, page.read_text()) == (
        2,
        True,
        "mine",
    )
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("content", [None, b"", b"x" * 100])
def test_a_broken_map_is_a_bad_input(run: Any, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "conflict.safetensors").write_bytes(content)
    done = run("ranges", tmp_path)
    assert (done.code, "not a conflict map" in done.err, "fix:" in done.err) == (3, True, True)


def test_ranges_for_another_trainer(
    run: Any, conflict: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PLOTS, lambda summary: DRAWN)
    out = tmp_path / "p.json"
    done = run("ranges", conflict, "--cuts", 900, "-o", out, "--for", "musubi", "--shift", 5)
    low, high = done.out.splitlines()[2::2]
    assert done.code == 0 and done.out.startswith(f"{out}\n# 0000-0900\n")
    assert low.endswith("--min_timestep 0 --max_timestep 900") and "shift 5" in high
    assert "kohya-ss/musubi-tuner" in done.err and "boundary_ratio 0.9" in done.err
    again = run("ranges", out, "--for", "musubi", "--shift", 5)
    assert (again.code, again.out) == (0, done.out.partition("\n")[2])
    said = json.loads(run("ranges", out, "--for", "diffsynth", "--shift", 5, "--json").out)["for"]
    assert said["convention"] == "index" and said["boundary_ratio"] == 0.9
    assert said["ranges"][1]["lines"] == ["--min_timestep_boundary 0 --max_timestep_boundary 0.358"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--for", "diffsynth"), "give --shift 5 for Wan"),
        (("--for", "musubi", "--cuts", 100), "is a partition already, and --cuts"),
        (("--for", "musubi", "-o", "p.json"), "is a partition already, and --out"),
        (("--shift", 5), "give --for TRAINER"),
        (("--for", "mine"), "'musubi'"),
    ],
)
def test_mistakes_about_other_trainers(
    run: Any, tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    path = tmp_path / "partition.json"
    Partition.from_cuts(1000, [900]).save(path)
    done = run("ranges", path, *arguments)
    assert (done.code, message in done.err, done.out) == (2, True, ""), done.err
