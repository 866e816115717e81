"""`demerge finetune` and `demerge sample`: what they write, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

FAST = ("--data", "digits", "--max-train-steps", 2, "--train-batch-size", 2, "--device", "cpu")


def test_experts_land_where_scripts_expect_them(run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    done = run("finetune", tiny, "--ranges", "uniform:4", "-o", out, *FAST)
    assert (done.code, done.out.strip()) == (0, str(out))
    names = ["0000-0250", "0250-0500", "0500-0750", "0750-1000", "finetune.yaml"]
    assert sorted(p.name for p in out.iterdir()) == names
    again = run("finetune", tiny, "--ranges", "uniform:4", "-o", out, *FAST, "--json")
    assert json.loads(again.out)["finished_steps"] == 8
    images = tmp_path / "images"
    assert (
        run(
            "sample",
            tiny,
            "--experts",
            out,
            "--num-images",
            3,
            "--steps",
            4,
            "-o",
            images,
            "--device",
            "cpu",
        ).code
        == 0
    )
    assert [p.name for p in sorted(images.glob("*.png"))] == [
        "000000.png",
        "000001.png",
        "000002.png",
    ]
    assert Image.open(images / "000000.png").size == (8, 8)


def test_joint_counts_the_steps_of_all_experts(run, tiny: Path, tmp_path: Path) -> None:
    assert run("finetune", tiny, "--ranges", "joint:3", "-o", tmp_path, *FAST).code == 0
    assert json.loads((tmp_path / "0000-1000" / "expert.json").read_text())["steps"] == 6


def test_random_start_needs_no_base(run, tmp_path: Path) -> None:
    config = tmp_path / "c.json"
    unet = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [8],
        "norm_num_groups": 4,
    }
    unet |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    config.write_text(json.dumps({"unet": unet, "scheduler": {"num_train_timesteps": 100}}))
    out = tmp_path / "base"
    assert (
        run(
            "finetune",
            config,
            "--init",
            "random",
            "--ranges",
            "joint",
            "-o",
            out,
            *FAST,
            "--save-dtype",
            "float16",
        ).code
        == 0
    )
    from demerge.evaluation.models import detect_kind

    made = {path.name: path.read_bytes() for path in (out / "0000-0100").glob("*.json*")}
    assert set(made) == {
        "base.json",
        "log.jsonl",
        "model_index.json",
    }  # a base is no control, hence no expert.json
    assert detect_kind(out / "0000-0100") == "model"
    again = run(
        "finetune",
        config,
        "--init",
        "random",
        "--ranges",
        "joint",
        "-o",
        out,
        *FAST,
        "--save-dtype",
        "float16",
    )
    assert (
        again.code,
        {path.name: path.read_bytes() for path in (out / "0000-0100").glob("*.json*")},
    ) == (0, made)
    assert (
        run(
            "sample",
            out / "0000-0100",
            "--num-images",
            1,
            "--steps",
            2,
            "-o",
            tmp_path / "i",
            "--device",
            "cpu",
        ).code
        == 0
    )


def test_dry_run_writes_nothing(run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    done = run("finetune", tiny, "-o", out, *FAST, "--dry-run", "--json")
    plan = json.loads(done.out)
    assert done.code == 0
    assert plan["steps_per_expert"] == 2
    assert plan["parameters"] > 10_000
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (("--ranges", "unifrom:4"), 2, "neither uniform:N"),
        (("--ranges", "uniform:0"), 2, "0 ranges"),
        (("--learning-rate", "-1"), 2, "learning_rate is -1.0"),
        (("--data", "/nowhere"), 3, "/nowhere"),
        (("--device", "quantum"), 2, "quantum"),
        (("--init", "zero"), 2, "'zero' is not one of"),
        (("--split", "dev"), 2, "dev"),
    ],
)
def test_mistakes_are_named(
    run, tiny: Path, tmp_path: Path, changes, code: int, message: str
) -> None:
    done = run("finetune", tiny, "-o", tmp_path / "e", *FAST, *changes)
    assert done.code == code
    assert message in done.err
    assert "fix:" in done.err
    assert not (tmp_path / "e").exists()


def test_other_options_in_the_same_folder_are_refused(run, tiny: Path, tmp_path: Path) -> None:
    assert run("finetune", tiny, "--ranges", "joint", "-o", tmp_path, *FAST).code == 0
    done = run("finetune", tiny, "--ranges", "joint", "-o", tmp_path, *FAST, "--global-prob", "0.5")
    assert done.code == 2
    assert "global_prob was 0.3, now 0.5" in done.err


def test_a_folder_that_is_no_model(run, tmp_path: Path) -> None:
    done = run("sample", tmp_path, "-o", tmp_path / "i")
    assert done.code == 3
    assert "model_index.json" in done.err


def test_broken_images_are_named_and_can_be_left_out(
    run, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    (image_folder / "broken.png").write_text("<html>404</html>")
    train = (
        "--data",
        image_folder,
        "--split",
        "all",
        "--max-train-steps",
        1,
        "--train-batch-size",
        2,
        "--device",
        "cpu",
    )
    refused = run("finetune", tiny, "--ranges", "joint", "-o", tmp_path / "e", *train)
    assert refused.code == 3
    assert "broken.png" in refused.err
    assert "--skip-broken" in refused.err
    assert (
        run(
            "finetune", tiny, "--ranges", "joint", "-o", tmp_path / "e", *train, "--skip-broken"
        ).code
        == 0
    )


def test_captions_that_are_not_there(run, tiny: Path, tmp_path: Path) -> None:
    assert run("sample", tiny, "--captions", tmp_path / "none.txt", "-o", tmp_path / "i").code == 2


def test_dry_run_compares_with_what_is_there(run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    assert run("finetune", tiny, "-o", out, *FAST).code == 0
    assert run("finetune", tiny, "-o", out, *FAST, "--dry-run").code == 0
    refused = run("finetune", tiny, "-o", out, *FAST, "--learning-rate", 1e-4, "--dry-run")
    assert (refused.code, "learning_rate was 5e-05, now 0.0001" in refused.err) == (2, True)


def test_lora_experts_go_the_whole_way(run, tiny: Path, tmp_path: Path) -> None:
    """Planned, trained, inspected, merged, sampled and evaluated as full experts are."""
    out = tmp_path / "e"
    train = ("finetune", tiny, "--ranges", "uniform:2", "-o", out, *FAST, "--lora-rank", 2)
    done = run(*train)
    assert done.code == 0
    assert "lora    rank 2 on 16 layers: 1,024 parameters, " in done.err
    known = json.loads(run("inspect", out / "0000-0500", "--json").out)
    assert (known["range"], known["mergeable"]) == ([0, 500], True)
    merged = tmp_path / "merged"
    assert run("merge", tiny, *sorted(out.glob("*-*")), "--weights", "1,1", "-o", merged).code == 0
    images = tmp_path / "images"
    draw = ("--num-images", 2, "--steps", 2, "--device", "cpu")
    assert run("sample", tiny, "--experts", out, "-o", images, *draw).code == 0
    models = (tiny, out, out / "0500-1000")
    judge = ("--data", "digits", "-o", tmp_path / "run", "--seeds", 1, "--ranges", "none")
    done = run("evaluate", *models, *judge, "--num-images", 8, "--steps", 1)
    assert done.code == 0, done.err
    kinds = [
        json.loads(path.read_text())["kind"] for path in (tmp_path / "run/scores").glob("*.json")
    ]
    assert sorted(kinds) == ["base", "ensemble", "expert", "real"]
