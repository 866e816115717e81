from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from demerge.data import load_images
from demerge.evaluate.protocol import Scores
from demerge.images import write_pngs

SMALL = ("--data", "digits", "--num-images", "20", "--steps", "2", "--loss-samples", "16", "--reference-images", "100")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    write_pngs(folder, load_images("digits", split="train").images(range(30)))
    return folder


def test_from_models_to_a_report(run: Callable[..., Any], make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    base, other, out = make_tiny(seed=0), make_tiny(seed=1), tmp_path / "run"
    (other / "demerge.json").write_text(json.dumps({"experts": [{"range": [0, 500]}]}))
    arguments = ("evaluate", f"base={base}", f"ties={other}", *SMALL, "--seeds", "0,1", "-o", out)
    first = run(*arguments, "--json")
    assert first.code == 0, first.err
    document = json.loads(first.out)
    assert [(s["model"], s["kind"], s["seed"]) for s in document["scores"]] == [
        ("digits train", "real", 0),
        ("base", "base", 0),
        ("base", "base", 1),
        ("ties", "merge", 0),
        ("ties", "merge", 1),
    ]
    assert "FD[digits-cnn]" in first.err
    written = {path.name: path.stat().st_mtime_ns for path in (out / "scores").iterdir()}
    assert {"base.seed0.json", "base.seed0.png", "ties.seed1.json", "real.json"} <= set(written)
    score = Scores.load(out / "scores" / "ties.seed0.json")
    assert score.metrics["drift"] > 0
    assert score.losses is not None
    assert Scores.load(out / "scores" / "base.seed0.json").metrics["drift"] == pytest.approx(0, abs=1e-9)

    again = run(*arguments)
    assert again.out.strip() == str(out / "scores")
    assert {path.name: path.stat().st_mtime_ns for path in (out / "scores").iterdir()} == written, "nothing is made twice"

    report = run("compare", out, "--json")
    assert report.code == 0, report.err
    assert sorted(json.loads(report.out)["ranking"]) == ["base", "ties"]
    assert (out / "report" / "index.html").is_file()
    assert len(pd.read_csv(out / "report" / "scores.csv")) == 3


def test_a_folder_of_images_is_scored_as_it_is(run: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    result = run("evaluate", pictures, *SMALL, "--features", "random", "-o", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    score = json.loads(result.out)["scores"][1]
    assert (score["model"], score["protocol"]["num_images"]) == ("pictures", 20)
    assert "unknown" in score["protocol"]["sampler"]


def test_unlike_protocols_end_with_6(run: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    for name, count in (("a", 20), ("b", 25)):
        options = ("--data", "digits", "--num-images", count, "--no-lpips", "--reference-images", "100")
        assert run("evaluate", f"{name}={pictures}", *options, "-o", tmp_path / name).code == 0
    result = run("compare", tmp_path / "a/scores/a.json", tmp_path / "b/scores/b.json")
    assert result.code == 6
    assert "num_images: 20 | 25" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--features", "clip"), 2, "clip"),
        (("--features", "inception:/absent"), 3, "absent"),
        (("--seeds", "0,x"), 2, "0,x"),
        (("--seeds", "1,1"), 2, "1,1"),
        (("--split", "val"), 2, "val"),
        (("--data", "/absent"), 3, "absent"),
        (("--num-images", "1"), 2, "--num-images"),
        (("--device", "abacus"), 2, "abacus"),
    ],
)
def test_mistakes(
    run: Callable[..., Any], pictures: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    result = run("evaluate", pictures, *SMALL, *arguments, "-o", tmp_path / "run")
    assert result.code == code, result.err
    assert words in result.err


def test_mistakes_about_models(run: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("evaluate", empty, *SMALL, "-o", tmp_path / "run").code == 3
    assert run("evaluate", tiny, *SMALL, "--ranges", "five", "-o", tmp_path / "run").code == 2
    assert run("evaluate", tiny, *SMALL, "--sampler", "magic", "-o", tmp_path / "run").code == 2
    assert run("compare", tmp_path / "absent").code == 3
    assert run("compare", empty).code == 3


def test_a_damaged_strip_is_named(run: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    assert run("evaluate", pictures, *SMALL, "--no-lpips", "-o", tmp_path / "run").code == 0
    Image.new("RGB", (15, 3)).save(tmp_path / "run/scores/pictures.png")
    result = run("compare", tmp_path / "run")
    assert result.code == 3
    assert "pictures.png" in result.err
