"""`demerge demo` at small size: every command of the path runs, and the report is there."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest


@pytest.mark.slow  # `make demo` walks it before the tests
def test_demo_walks_the_whole_path(run, tmp_path: Path) -> None:
    out = tmp_path / "my run"
    small = (
        "--steps",
        1,
        "--num-images",
        70,
        "--seeds",
        2,
        "--sampling-steps",
        2,
        "--cell-size",
        2,
    )
    done = run("demo", "-o", out, *small)
    assert done.code == 0, done.err
    assert done.out.strip() == str(out / "report" / "index.html")
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert "Content-Security-Policy" in page
    table = pd.read_csv(out / "report" / "scores.csv")
    kinds = table["kind"].value_counts()
    assert kinds["merge"] >= 5
    assert {"base", "joint", "ensemble"} <= set(kinds.index)
    commands = [
        shlex.split(line) for line in json.loads((out / "commands.json").read_text())["commands"]
    ]
    assert {words[1] for words in commands} == {
        "analyze",
        "finetune",
        "stats",
        "merge",
        "evaluate",
        "compare",
    }
    assert all(words[0] == "demerge" for words in commands)
    assert run("demo", "-o", out, *small).code == 0


def test_another_base_is_refused(run, tmp_path: Path) -> None:
    done = run("demo", "--base", "digits", "-o", tmp_path / "out")
    assert (done.code, "not one of 'digits-early', 'digits-base'" in done.err) == (2, True)
