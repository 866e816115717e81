"""`--config FILE`: the same names as the options; a flag wins over the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

YAML = "data: digits\nranges: joint\nmax-train-steps: 5\nglobal_prob: 0.25\ndevice: cpu\n"
TOML = (
    'data = "digits"\nranges = "joint"\nmax_train_steps = 5\nglobal-prob = 0.25\ndevice = "cpu"\n'
)


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.toml", TOML)])
def test_a_flag_wins_over_the_file_and_the_file_over_the_default(
    run: Any, tiny: Path, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    flags = ("--max-train-steps", 3, "--dry-run", "--json")
    done = run("finetune", tiny, "-o", tmp_path / "e", "--config", tmp_path / name, *flags)
    options = json.loads(done.out)["options"]
    assert [options[n] for n in ("max_train_steps", "global_prob", "seed")] == [3, 0.25, 0]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("max_train_stps: 3", 2, "did you mean 'max_train_steps'?"),
        ("lr_scheduler: sine", 2, "'sine' is not one of"),
        ("max_train_steps: 0", 2, "max_train_steps is 0"),
        ("seed: [", 3, "not valid YAML"),
    ],
)
def test_mistakes_in_the_file_are_named(
    run: Any, tiny: Path, tmp_path: Path, text: str, code: int, message: str
) -> None:
    (tmp_path / "a.yaml").write_text(text)
    arguments = ("--data", "digits", "-o", tmp_path / "e", "--config", tmp_path / "a.yaml")
    done = run("finetune", tiny, *arguments)
    assert (done.code, message in done.err) == (code, True), done.err
    assert not (tmp_path / "e").exists()


def test_what_is_written_next_to_the_result_makes_it_again(
    run: Any, tiny: Path, tmp_path: Path
) -> None:
    out, sizes = tmp_path / "images", ("--num-images", 2, "--steps", 2, "--device", "cpu")
    assert run("sample", tiny, *sizes, "--seed", 4, "-o", out).code == 0
    record = yaml.safe_load((out / "sample.yaml").read_text())
    assert (record["model"], record["num_images"], record["seed"]) == (str(tiny), 2, 4)
    assert run("sample", "--config", out / "sample.yaml", "-o", tmp_path / "again").code == 0
    one, two = ((tmp_path / n / "000001.png").read_bytes() for n in ("images", "again"))
    assert one == two
