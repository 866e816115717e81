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
        (
            "lr_scheduler: sine",
            2,
            "a.yaml: lr_scheduler is 'sine'\n  fix: it must be one of 'constant'",
        ),
        ("seed: [1, 2]", 2, "a.yaml: seed is '1,2'\n  fix: it must be a valid integer"),
        ("max_train_steps: 0", 2, "a.yaml: max_train_steps is 0\n  fix: it must be at least 1"),
        ("ranges: uniform", 2, "a.yaml: ranges 'uniform' are neither uniform:N"),
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


MERGE = "method: ties\nsave_dtype: float32\n"


@pytest.mark.parametrize(
    "options",
    [
        "option: density=0.3",
        "option: {density: 0.3}",
        "option: [density=0.3]",
        "option: [density: 0.3]",
    ],
)
def test_a_repeatable_key_takes_a_text_a_table_or_a_list(
    run: Any, tiny: Path, tmp_path: Path, options: str
) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(MERGE + options)
    flags = ("--dry-run", "--json", "--config", config)
    done = run("merge", tiny, tiny, *flags)
    assert done.code == 0, done.err
    assert json.loads(done.out)["recipe"]["options"]["density"] == 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: []", "a.yaml: unknown key 'rules'\n  fix: write 'rule', as the option is called"),
        (
            "options: {}",
            "fix: write 'option', as the option is called; a recipe calls it 'options'",
        ),
        ("format: demerge.recipe/1", "fix: a recipe has this key; --recipe takes recipes"),
        ("option: density", "a.yaml: option 'density' has no value"),
        ("option: {density: 2}", "a.yaml: option density=2 is not float in (0, 1]"),
        ("weights: [a]", "a.yaml: weights 'a' are not numbers"),
    ],
)
def test_mistakes_of_a_merge_name_the_file_and_the_key(
    run: Any, tiny: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "a.yaml").write_text(MERGE + text)
    done = run("merge", tiny, tiny, "--dry-run", "--config", tmp_path / "a.yaml")
    assert (done.code, message in done.err) == (2, True), done.err


def test_an_error_of_a_flag_does_not_name_the_file(run: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(MERGE + "weights: 0.5,0.5")
    done = run("merge", tiny, tiny, "--weights", "x", "--config", tmp_path / "a.yaml")
    assert (done.code, "a.yaml" in done.err) == (2, False), done.err
