"""The program as a whole: quick help, exit codes, no traceback for a user's mistake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from demerge.cli import main as program
from demerge.errors import (
    ComparisonError,
    DemergeError,
    InputError,
    NumericalError,
    Preempted,
    ResourceError,
    UsageError,
)

COMMANDS = (
    "demo",
    "analyze",
    "ranges",
    "finetune",
    "merge",
    "methods",
    "evaluate",
    "compare",
    "sample",
    "inspect",
    "convert",
    "data",
    "doctor",
)


def test_help_names_every_command_and_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv=['demerge','--help']\n"
        "from demerge.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch','diffusers','numpy','pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "data"])
def test_every_command_explains_itself(run, command: str) -> None:
    done = run(command, "--help")
    assert done.code == 0
    assert command in done.out


def test_version(run) -> None:
    done = run("--version")
    assert (done.code, done.out.strip()) == (0, "0.1.0")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError, 2),
        (InputError, 3),
        (ResourceError, 4),
        (NumericalError, 5),
        (ComparisonError, 6),
        (Preempted, 75),
        (DemergeError, 1),
    ],
)
def test_each_error_has_its_exit_code(
    run, monkeypatch, error: type[DemergeError], code: int
) -> None:
    def fail(**_: object) -> None:
        raise error("what is wrong", fix="what to do")

    monkeypatch.setattr(program, "app", fail)
    done = run()
    assert done.code == code
    assert done.err == "demerge: what is wrong\n  fix: what to do\n"


def test_a_bug_says_so_and_hides_its_traceback(run, monkeypatch) -> None:
    monkeypatch.setattr(program, "app", lambda **_: 1 / 0)
    done = run()
    assert done.code == 1
    assert "a bug in demerge: ZeroDivisionError" in done.err


def test_interrupt_is_130(run, monkeypatch) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    for app in (
        interrupt,
        lambda **_: 130,
    ):  # typer returns the code where it catches Ctrl-C itself
        monkeypatch.setattr(program, "app", app)
        done = run()
        assert done.code == 130 and "interrupted" in done.err


def test_unknown_command_and_option_are_usage_errors(run) -> None:
    assert run("mrege").code == 2
    assert run("merge", "--no-such-option").code == 2


def test_underscores_and_dashes_are_the_same(run, tmp_path) -> None:
    for option in ("--max_train_steps", "--max-train-steps"):
        done = run("finetune", tmp_path / "none", "--data", "digits", "-o", tmp_path, option, "0")
        assert done.code == 2
        assert "max_train_steps is 0" in done.err


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert (
        program.printable("a\x1b[31mb\x07\nc")
        == "a\N{REPLACEMENT CHARACTER}[31mb\N{REPLACEMENT CHARACTER}\nc"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigterm_ends_training_with_a_checkpoint(tiny, tmp_path) -> None:
    """A forked program, which need not import torch once more, and a real signal."""
    arguments = ["finetune", tiny, "--data", "digits", "--ranges", "joint", "-o", tmp_path / "x"]
    arguments += ["--max-train-steps", 100_000, "--train-batch-size", 2]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(write, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
            sys.argv = ["demerge", *map(str, arguments)]
            program.main()
        except SystemExit as stopped:
            sys.stderr.flush()
            os._exit(int(stopped.code or 0))
        finally:
            os._exit(1)
    os.close(write)
    with open(read, encoding="utf-8") as err:
        assert any(line.startswith("finetune") for line in err)
        time.sleep(0.5)
        os.kill(child, signal.SIGTERM)
        said = err.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert "run the same command to continue" in said
    assert list((tmp_path / "x" / "state" / "0000-1000").glob("step-*/manifest.json"))
