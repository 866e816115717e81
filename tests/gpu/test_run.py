"""The GPU script ends well whatever a check does, and all of it runs on a CPU at toy size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().with_name("run")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The module tests/gpu/run."""
    loader = SourceFileLoader("gpu_run", str(SCRIPT))
    spec = spec_from_loader("gpu_run", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["gpu_run"] = module  # dataclasses look it up
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


@pytest.fixture
def result(script: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """Run a function as a check: result(function, limit) -> Result."""

    def run(function: Callable[[], object], limit: float = 30) -> Any:
        check = script.Check("check", limit, function, script.read_tests)
        return script.run_forked(check, tmp_path, limit)

    return run


def test_a_check_gives_its_document(result: Callable[..., Any]) -> None:
    ended = result(lambda: print(json.dumps({"passed": 3})))
    assert (ended.status, ended.document, ended.log) == ("done", {"passed": 3}, "")
    assert [(m.name, m.value, m.is_met) for m in ended.measures] == [
        ("passed", 3, None),
        ("skipped", 0, None),
        ("failed", 0, True),
    ]


def test_a_crash_ends_one_check_alone(result: Callable[..., Any]) -> None:
    assert result(lambda: os.kill(os.getpid(), signal.SIGKILL)).status == "crashed"
    ended = result(lambda: 1 / 0)
    assert ended.status == "crashed" and "ZeroDivisionError" in ended.log
    assert result(lambda: print("no document")).status == "crashed"
    assert result(lambda: sys.exit("why")).status == "crashed"


def test_a_check_that_hangs_is_killed_with_what_it_started(
    result: Callable[..., Any], tmp_path: Path
) -> None:
    def hang() -> None:
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / "pid").write_text(str(child.pid))
        child.wait()

    start = time.monotonic()
    ended = result(hang, limit=1)
    assert ended.status == "over its limit of 1 s" and time.monotonic() - start < 30
    status = Path("/proc", (tmp_path / "pid").read_text(), "status")
    assert not status.exists() or "zombie" in status.read_text()


def test_targets_are_met_or_missed_and_never_a_failure(script: ModuleType) -> None:
    rows = [("bare", 1.0), ("ours", 1.02), ("foldable", 1.1), ("graph", 0.5)]
    lines = [{"row": row, "ratio": r, "images": 1.0, "memory": 1.0} for row, r in rows]
    measures = {m.name: m for m in script.read_finetune({"lines": lines})}
    assert measures["eager: time / bare"].is_met is True
    assert measures["graph: images/s / bare"].is_met is False
    assert measures["graph: images/s / bare"].target == ">= 2.5"
    assert measures["foldable: time / bare"].is_met is None


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--toy", "--json", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    checks = {check["name"]: check for check in json.loads(out.read_text())["checks"]}
    names = ["machine", "tests", "finetune", "conflict", "sample", "session", "recipe"]
    assert list(checks) == names
    assert {check["status"] for check in checks.values()} == {"done"}
    assert "<= 1.03" in run.stdout and ">= 2.5" not in run.stdout  # no graph on a CPU
    scored = {measure["name"].partition(" of ")[2] for measure in checks["recipe"]["measures"]}
    assert {"base", "joint", "ensemble", "average", "ties", "dare", "fisher"} <= scored
