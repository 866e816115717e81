from __future__ import annotations

import json
import shutil
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from demerge.data import load_images
from demerge.evaluation.scores import Scores
from demerge.reporting.html import render_page
from demerge.reporting.images import png

SMALL = (
    "--data",
    "digits",
    "--num-images",
    "20",
    "--steps",
    "2",
    "--loss-samples",
    "16",
    "--reference-images",
    "100",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    draw_digits(folder, 30)
    return folder


def draw_digits(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(load_images("digits", split="train").images(range(count))):
        (folder / f"{i}.png").write_bytes(png(image))


def test_scores_of_another_precision_are_made_anew(
    run: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    """The noise floor is of real images, which no sampler made."""
    command = ("evaluate", tiny, *SMALL, "--seeds", "0", "-o", tmp_path)
    path = tmp_path / "scores" / f"{tiny.name}.seed0.json"
    assert run(*command).code == 0
    exact = Scores.load(path)
    assert run(*command, "--mixed-precision", "bf16").code == 0
    half = Scores.load(path)
    assert (exact.protocol.mixed_precision, half.protocol.mixed_precision) == ("no", "bf16")
    assert exact.images != half.images
    assert Scores.load(tmp_path / "scores" / "real.json").protocol.mixed_precision == "no"


def test_from_models_to_a_report(
    run: Callable[..., Any],
    make_tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    assert Scores.load(out / "scores" / "base.seed0.json").metrics["drift"] == pytest.approx(
        0, abs=1e-9
    )

    again = run(*arguments)
    assert again.out.strip() == str(out / "scores")
    assert {path.name: path.stat().st_mtime_ns for path in (out / "scores").iterdir()} == written, (
        "nothing is made twice"
    )

    report = run("compare", out, "--json")
    assert report.code == 0, report.err
    assert sorted(json.loads(report.out)["ranking"]) == ["base", "ties"]
    assert (out / "report" / "index.html").is_file()
    assert len(pd.read_csv(out / "report" / "scores.csv")) == 3

    monkeypatch.setattr("demerge.reporting.theme.render", lambda *_: b"<svg/>")  # drawn once above
    elsewhere = tmp_path / "elsewhere"
    assert run("compare", out, "-o", elsewhere).code == 0
    assert run("compare", "--config", elsewhere / "compare.yaml").code == 0


def test_a_folder_of_images_is_scored_as_it_is(
    run: Callable[..., Any], pictures: Path, tmp_path: Path
) -> None:
    result = run(
        "evaluate", pictures, *SMALL, "--features", "random", "-o", tmp_path / "run", "--json"
    )
    assert result.code == 0, result.err
    score = json.loads(result.out)["scores"][1]
    assert (score["model"], score["protocol"]["num_images"]) == ("pictures", 20)
    assert "unknown" in score["protocol"]["sampler"]


def test_unlike_protocols_end_with_6(
    run: Callable[..., Any], pictures: Path, tmp_path: Path
) -> None:
    for name, count in (("a", 20), ("b", 25)):
        options = (
            "--data",
            "digits",
            "--num-images",
            count,
            "--no-lpips",
            "--reference-images",
            "100",
        )
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
        (("--num-images", "1"), 2, "num_images is 1"),
        (("--device", "abacus"), 2, "abacus"),
    ],
)
def test_mistakes(
    run: Callable[..., Any],
    pictures: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    words: str,
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


def test_every_model_is_resolved_before_the_first_image(
    run: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    next((broken / "unet").glob("*.safetensors")).unlink()
    for last in (broken, tmp_path / "absent", tmp_path / "file.safetensors"):
        result = run("evaluate", tiny, last, *SMALL, "-o", tmp_path / "run")
        assert result.code == 3, result.err
        assert last.name in result.err
        assert not (tmp_path / "run").exists(), "no feature was taken and no image made"


def test_plots_among_the_models_are_left_out_and_named(
    run: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    plots = tmp_path / "merged" / "ties-report"
    draw_digits(plots, 2)
    (plots / "index.html").write_text(render_page("What the merge did", "", [], ""))
    result = run(
        "evaluate",
        tiny,
        plots,
        *SMALL,
        "--no-lpips",
        "--seeds",
        "0",
        "-o",
        tmp_path / "run",
        "--json",
    )
    assert result.code == 0, result.err
    assert "ties-report holds plots that demerge wrote" in result.err
    assert {score["model"] for score in json.loads(result.out)["scores"]} == {
        tiny.name,
        "digits train",
    }
    assert run("evaluate", f"ties={plots}", *SMALL, "-o", tmp_path / "other").code == 2


def test_compare_ranks_the_largest_group_and_prints_its_verdict(
    run: Callable[..., Any], make_scores: Callable[..., list[Scores]], tmp_path: Path
) -> None:
    groups = [
        ("base", "base", {}),
        ("ties", "merge", {}),
        ("pictures", "model", {"sampler": "unknown", "steps": 0}),
    ]
    for name, kind, changes in groups:
        for score in make_scores(name, kind, [8.0, 7.0, 7.5], **changes):
            score.save(tmp_path / "run" / "scores" / f"{name}.seed{score.seed}.json")
    result = run("compare", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert sorted(document["ranking"]) == ["base", "ties"]
    assert document["unranked"] == ["pictures"]
    assert document["verdict"] in result.err
    for words in ("Training seeds: 1", "Not ranked, since the protocol differs: pictures"):
        assert words in result.err


def test_what_is_linked_out_of_a_run_stays_out_of_its_report(
    run: Callable[..., Any], make_scores: Callable[..., list[Scores]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for name, kind in (("base", "base"), ("ties", "merge")):
        make_scores(name, kind, [8.0])[0].save(folder / "scores" / f"{name}.seed0.json")
    secret = tmp_path / "secret.svg"
    secret.write_text("<svg>the secret</svg>")
    (folder / "conflict").mkdir()
    (folder / "conflict" / "heatmap.svg").symlink_to(secret)
    (folder / "commands.json").symlink_to(secret)
    (folder / "own.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "own.dark.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' color='white'/>")
    result = run("compare", folder)
    assert result.code == 0, result.err
    page = (folder / "report" / "index.html").read_text()
    assert b64encode(secret.read_bytes()).decode() not in page
    assert "heatmap.svg is a link out of the run" in page and "commands.json is a link" in page
    for name in ("own.svg", "own.dark.svg"):
        assert page.count(b64encode((folder / name).read_bytes()).decode()) == 1
    (folder / "scores" / "linked.json").symlink_to(secret)
    assert run("compare", folder).code == 3


def test_statistics_of_another_program_are_the_reference(
    run: Callable[..., Any], pictures: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    arguments = (
        "evaluate",
        pictures,
        *SMALL[:4],
        "--no-lpips",
        "--reference",
        tmp_path / "stats.npz",
        "-o",
        tmp_path / "run",
    )
    refused = run(*arguments)
    assert refused.code == 3
    assert "--reference-images N" in refused.err
    result = run(*arguments, "--reference-images", "50000", "--json")
    assert result.code == 0, result.err
    floor, score = json.loads(result.out)["scores"]
    assert floor["model"] == "digits test"
    assert score["protocol"]["reference_n"] == 50_000
    assert min(score["metrics"]["fd"], floor["metrics"]["fd"]) > 0
    assert "kid" not in score["metrics"]


def test_a_damaged_strip_is_named(run: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    assert run("evaluate", pictures, *SMALL, "--no-lpips", "-o", tmp_path / "run").code == 0
    Image.new("RGB", (15, 3)).save(tmp_path / "run/scores/pictures.png")
    result = run("compare", tmp_path / "run")
    assert result.code == 3
    assert "pictures.png" in result.err
