"""`demerge sample`: images that stay, continued by the same command; guidance; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def test_the_same_command_draws_what_is_missing_and_then_says_that_nothing_is(
    run, tiny: Path, tmp_path: Path
) -> None:
    command = (
        "sample",
        tiny,
        "--num-images",
        3,
        "--steps",
        2,
        "-o",
        tmp_path / "i",
        "--device",
        "cpu",
    )
    assert run(*command).code == 0
    first = (tmp_path / "i" / "000001.png").read_bytes()
    (tmp_path / "i" / "000001.png").unlink()
    done = run(*command, "--json")
    assert (done.code, json.loads(done.out)["drawn"]) == (0, 1)
    assert "2 of 3 images existed already" in done.err
    assert (tmp_path / "i" / "000001.png").read_bytes() == first
    done = run(*command)
    assert done.code == 0
    assert "3 of 3 images existed already; nothing is left to do" in done.err
    done = run(*command, "--seed", 1)
    assert done.code == 2
    assert "seed was 0, now 1" in done.err


def test_images_of_another_precision_are_not_mixed(run, tiny: Path, tmp_path: Path) -> None:
    """A record of a time before the option is one in float32."""
    out = tmp_path / "i"
    command = ("sample", tiny, "--num-images", 2, "--steps", 2, "-o", out, "--device", "cpu")
    done = run(*command, "--json")
    assert (done.code, json.loads(done.out)["mixed_precision"]) == (0, "no")
    record = json.loads((out / "sample.json").read_text())
    assert record["options"].pop("mixed_precision") == "no"
    (out / "sample.json").write_text(json.dumps(record))
    assert run(*command).code == 0
    done = run(*command, "--mixed-precision", "bf16")
    assert done.code == 2
    assert "mixed_precision was 'no', now 'bf16'" in done.err
    done = run(*command[:-4], "-o", tmp_path / "j", "--device", "cpu", "--mixed-precision", "bf16")
    assert done.code == 0
    assert "2 steps, seed 0, bf16" in done.err


def test_a_foreign_folder_is_a_usage_error(run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "mine.txt").write_text("x")
    done = run(
        "sample", tiny, "--num-images", 1, "--steps", 2, "-o", tmp_path / "i", "--device", "cpu"
    )
    assert done.code == 2
    assert "exists already" in done.err


def test_guidance_changes_the_images_of_a_text_model_alone(
    run, tiny: Path, tiny_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "c.txt").write_text("a cat\n")
    images = []
    for scale in (1, 9):
        out = tmp_path / str(scale)
        options = (
            "--num-images",
            1,
            "--steps",
            2,
            "--captions",
            tmp_path / "c.txt",
            "--guidance-scale",
            scale,
            "-o",
            out,
        )
        assert run("sample", tiny_text, *options, "--device", "cpu").code == 0
        images.append(np.asarray(Image.open(out / "000000.png")))
    assert not np.array_equal(*images)
    for scale, message in ((3, "takes no condition"), (0.5, "")):
        done = run(
            "sample", tiny, "--guidance-scale", scale, "-o", tmp_path / "x", "--device", "cpu"
        )
        assert done.code == 2
        assert message in done.err
    assert not (tmp_path / "x").exists()
