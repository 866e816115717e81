"""Odd names: bytes that are not UTF-8, escape sequences, names as long as a file system takes, places that cannot exist."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demerge import Partition
from demerge.cli import common
from demerge.errors import UsageError
from demerge.merging import merge
from demerge.storage.atomic import commit_dir, commit_json, commit_text

HOSTILE = {
    "not UTF-8": os.fsdecode(b"caf\xe9"),
    "a sequence": "\x1b[31mred",
    "a C1 sequence": "\x9b2J",
    "markup": "[bold]x",
}
hostile = pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
LONG = "n" * 255
FAST = (
    "--data",
    "digits",
    "--device",
    "cpu",
    "--max-train-steps",
    1,
    "--train-batch-size",
    2,
    "--ranges",
    "joint",
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_clean(done: Any) -> bool:
    """Whether a terminal gets nothing but text, and no bug was met."""
    text = done.out + done.err
    return "a bug in demerge" not in text and all(c.isprintable() or c == "\n" for c in text)


@hostile
def test_no_name_reaches_the_terminal(run: Any, tiny: Path, here: Path, name: str) -> None:
    shutil.copytree(tiny, here / name)
    (here / "images").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(here / "images" / f"{name}.png")
    (here / "images" / f"{name}2.png").write_text("broken")
    commands = (
        ("inspect", name),
        ("inspect", f"{name}/absent"),
        ("finetune", name, *FAST, "-o", f"{name}-e"),
        ("sample", name, "--num-images", 1, "--steps", 2, "-o", f"{name}-s", "--device", "cpu"),
        (
            "merge",
            tiny,
            tiny,
            tiny,
            "--method",
            "average",
            "--weights",
            "0.5,0.25",
            "-o",
            f"{name}-m",
        ),
        ("merge", name, name, name, "--method", "average", "-o", "m"),
        ("data", "check", "images"),
        ("data", "check", name),
        ("ranges", name),
        ("compare", name),
        ("transfer", name, name, "--map", name),
        (name,),
        ("inspect", f"--{name}"),
    )
    for command in commands:
        done = run(*command)
        assert is_clean(done), (command, done)
    assert (here / f"{name}-s" / "000000.png").is_file()
    assert (here / f"{name}-e" / "0000-1000" / "expert.json").is_file()


@hostile
def test_json_has_every_name(run: Any, tiny: Path, here: Path, name: str) -> None:
    shutil.copytree(tiny, here / name)
    done = run("inspect", name, "--json")
    assert done.code == 0 and is_clean(done)
    assert json.loads(done.out)["path"] == name


def test_a_recipe_names_no_path_that_is_not_text(tiny: Path, here: Path) -> None:
    shutil.copytree(tiny, here / HOSTILE["not UTF-8"])
    with pytest.raises(UsageError, match="not UTF-8"):
        merge(tiny, [HOSTILE["not UTF-8"]], here / "out")


def test_files_hold_text(here: Path) -> None:
    assert json.loads(commit_json(here / "a.json", [HOSTILE["not UTF-8"], "é"]).read_text()) == [
        "caf?",
        "é",
    ]


def test_names_of_255_bytes(run: Any, tiny: Path, here: Path) -> None:
    assert commit_text(here / LONG, "x").read_text() == "x"
    with commit_dir(here / LONG[1:]) as folder:
        (folder / "x").touch()
    assert sorted(path.name for path in here.iterdir()) == [LONG[1:], LONG]
    (here / LONG).unlink()
    shutil.copytree(tiny, here / LONG)
    assert run("merge", tiny, LONG, tiny, "--method", "average", "-o", "e" * 255).code == 0
    assert (
        run(
            "sample", LONG, "--num-images", 1, "--steps", 2, "--device", "cpu", "-o", "s" * 255
        ).code
        == 0
    )
    assert run("inspect", "e" * 255, "--json").code == 0
    commit_text(here / ("j" * 250 + ".json"), '{"ranges": [[0, 1000]]}')
    assert len(Partition.load(here / ("j" * 250 + ".json"))) == 1


def test_strays_of_long_names_are_swept(here: Path) -> None:
    commit_text(here / LONG, "x")
    stray = subprocess.run(
        [sys.executable, "-c", STRAY, here / LONG], capture_output=True, text=True, check=False
    )
    assert stray.returncode == -9, stray.stderr
    assert len(list(here.iterdir())) == 2
    commit_text(here / LONG, "y")
    assert [path.name for path in here.iterdir()] == [LONG]


STRAY = """
import os, pathlib, sys
from demerge.storage.atomic import commit_file
commit_file(pathlib.Path(sys.argv[1]), lambda stream: os.kill(os.getpid(), 9))
"""


@pytest.mark.parametrize("out", ["file/x", "file/x/y", "l" * 256, "l" * 300 + "/x"])
@pytest.mark.parametrize(
    "command",
    [
        ("merge", "digits-base", "digits-base", "digits-base", "--method", "average"),
        ("sample", "digits-base", "--num-images", 1, "--steps", 2, "--device", "cpu"),
        ("finetune", "digits-base", *FAST),
        (
            "stats",
            "digits-base",
            "--data",
            "digits",
            "--ranges",
            "joint",
            "--device",
            "cpu",
            "--samples",
            2,
        ),
        (
            "analyze",
            "digits-base",
            "--data",
            "digits",
            "--device",
            "cpu",
            "--groups",
            5,
            "--bins",
            4,
            "--batch-size",
            2,
        ),
        (
            "evaluate",
            "digits-base",
            "--data",
            "digits",
            "--num-images",
            2,
            "--seeds",
            0,
            "--steps",
            2,
            "--device",
            "cpu",
        ),
    ],
    ids=lambda command: str(command[0]),
)
def test_a_place_that_cannot_be_is_a_usage_error(
    run: Any, here: Path, command: tuple[object, ...], out: str
) -> None:
    (here / "file").touch()
    done = run(*command, "-o", out)
    assert done.code == 2 and "cannot exist" in done.err, done


def test_a_deleted_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code = "import os, sys; os.rmdir(os.getcwd()); sys.argv[1:] = ['inspect', 'x']; from demerge.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "gone",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "demerge: the current folder was deleted\n  fix: cd to a folder that exists\n"
    )


def test_outputs_may_be_text(tiny: Path, here: Path) -> None:
    merge(str(tiny), [str(tiny), str(tiny)], "out", method="average")
    assert Path("out/model_index.json").is_file()
    Partition.uniform(1000, 2).save("p.json")
    assert len(Partition.load("p.json")) == 2


def test_commands_print_by_say_and_show_alone() -> None:
    folder = Path(common.__file__).parent
    for path in sorted(folder.glob("*.py")):
        calls = [
            node.func
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        ]
        names = [ast.unparse(call) for call in calls]
        if path.name not in ("common.py", "main.py"):
            assert not {"print", "typer.echo", "sys.stdout.write", "sys.stderr.write"} & set(
                names
            ), path
