"""`demerge merge`, `methods` and `inspect`: what scripts rely on, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def test_merge_as_scripts_call_it(run: Any, make_tiny: Any, tmp_path: Path) -> None:
    base, a, b = make_tiny(seed=0), make_tiny(seed=1), make_tiny(seed=2)
    out = tmp_path / "out"
    options = ("--method", "ties", "--weights", "0.3,0.3", "--option", "density=0.2", "--save-dtype", "float32")
    done = run("merge", base, a, b, *options, "-o", out)
    assert (done.code, done.out.strip()) == (0, str(out))
    assert "delta" in done.err
    inspected = json.loads(run("inspect", out, "--json").out)
    assert inspected["merged_by"] == "ties" and inspected["mergeable"] is True
    one = tmp_path / "one.safetensors"
    document = json.loads(run("merge", base, a, b, *options, "-o", one, "--json").out)
    assert document["recipe"]["options"]["density"] == 0.2
    assert all((load_file(one)[n] == t).all() for n, t in load_file(out / WEIGHTS).items())


def test_dry_run_writes_nothing(run: Any, tiny: Path, tmp_path: Path) -> None:
    done = run("merge", tiny, tiny, "--dry-run", "--json", "-o", tmp_path / "out", "--save-dtype", "bfloat16")
    plan = json.loads(done.out)
    assert done.code == 0 and not (tmp_path / "out").exists()
    assert plan["surviving_share"] == 1.0 and plan["changed_entries"] == 0
    assert plan["disk_bytes"] > 0 and plan["ram_bytes"] > 0 and plan["tensors_by_dtype"]
    assert run("merge", tiny, tiny, "--dry-run").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--method", "tise"), 2, "unknown merge method 'tise'"),
        (("--weights", "a,b"), 2, "weights 'a,b' are not numbers"),
        (("--weights", "1,2"), 2, "are not 1 finite numbers"),
        (("--option", "density"), 2, "option 'density' has no value"),
        (("--method", "ties", "--option", "density=2"), 2, "density=2 is not float in (0, 1]"),
        (("--save-dtype", "int4"), 2, "save dtype 'int4'"),
        (("--method", "fisher"), 2, "needs fisher"),
    ],
)
def test_refusals(run: Any, tiny: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = run("merge", tiny, tiny, "-o", tmp_path / "out", *arguments)
    assert done.code == code and message in done.err and "fix:" in done.err
    assert not (tmp_path / "out").exists()


def test_refusals_of_files(run: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>")
    for arguments, message in [
        ((tiny, tmp_path / "nowhere", "-o", tmp_path / "out"), "no such file"),
        ((tiny, tmp_path / "page.safetensors", "-o", tmp_path / "out"), "a web page"),
        ((tiny, tiny, "-o", tiny), "exists already"),
    ]:
        done = run("merge", *arguments)
        assert done.code == 3 and message in done.err
    assert run("merge", tiny, tiny).code == 2


def test_methods_are_listed(run: Any) -> None:
    methods = {m["name"]: m for m in json.loads(run("methods", "--json").out)["methods"]}
    assert set(methods) >= {"average", "task_arithmetic", "ties", "dare", "fisher"}
    assert methods["average"]["aliases"] == ["linear"]
    assert methods["ties"]["options"]["density"]["default"] == 0.2 and methods["ties"]["paper"] == "arXiv 2306.01708"
    assert methods["fisher"]["needs"] == ["fisher.safetensors per expert"]
    text = run("methods").out
    assert "density=0.2" in text and "arXiv 2306.01708" in text


def test_inspect_tells_a_person(run: Any, tiny: Path, tmp_path: Path) -> None:
    done = run("inspect", tiny)
    assert done.code == 0
    for fact in ("UNet2DModel", "epsilon", "DDPMScheduler", "float32", "mergeable", "yes"):
        assert fact in done.out
    assert json.loads(run("inspect", tiny / WEIGHTS, "--json").out)["kind"] == "file"
    assert run("inspect", tmp_path / "nowhere").code == 3
