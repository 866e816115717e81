"""The help of every command, as it is printed 100 columns wide, against tests/cli/help/COMMAND.txt.

After a change: `DEMERGE_HELP=write pytest tests/cli/test_help.py`, and read the diff.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from demerge.cli.main import PANELS, app

HELP = Path(__file__).with_name("help")
PATH = ["analyze", "ranges", "finetune", "merge", "evaluate", "compare"]
DIAGNOSTICS = ["stats", "layers", "transfer", "coefficients", "landscape"]


def commands(group: Any, *names: str) -> Iterator[tuple[str, ...]]:
    """The words of every command of the program, from the program's own list."""
    yield names
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *names, *name.split())


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 100)
    monkeypatch.setattr("typer.rich_utils.FORCE_TERMINAL", False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")


@pytest.mark.parametrize("words", list(commands(typer.main.get_command(app))), ids=" ".join)
def test_help_is_the_recorded_one(run: Any, columns: None, words: tuple[str, ...]) -> None:
    done = run(*words, "--help")
    assert done.code == 0
    text = re.sub(r"[ \t]+\n", "\n", done.out)
    text = re.sub(r"Usage: .*demerge", "Usage: demerge", text)
    file = HELP / f"{'-'.join(words) or 'demerge'}.txt"
    if os.environ.get("DEMERGE_HELP") == "write":
        HELP.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), "see the docstring of this file"


def test_no_help_is_left_over() -> None:
    names = {"-".join(words) or "demerge" for words in commands(typer.main.get_command(app))}
    assert {path.stem for path in HELP.glob("*.txt")} == names


def test_the_path_comes_first_and_diagnostics_have_a_panel_of_their_own() -> None:
    panels = {title: list(group) for title, group in PANELS.items()}
    assert next(iter(panels.values())) == PATH
    assert panels["Diagnostics"] == DIAGNOSTICS
