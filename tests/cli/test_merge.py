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
    options = (
        "--method",
        "ties",
        "--weights",
        "0.3,0.3",
        "--option",
        "density=0.2",
        "--save-dtype",
        "float32",
    )
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
    one = ("merge", tiny, tiny, "--weights", "1", "--dry-run")
    done = run(*one, "--json", "-o", tmp_path / "out", "--save-dtype", "bfloat16")
    plan = json.loads(done.out)
    assert done.code == 0 and not (tmp_path / "out").exists()
    assert plan["surviving_share"] == 1.0 and plan["changed_entries"] == 0
    assert plan["disk_bytes"] > 0 and plan["ram_bytes"] > 0 and plan["tensors_by_dtype"]
    assert run(*one).code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--method", "tise"), 2, "unknown merge method 'tise'"),
        (("--weights", "a,b"), 2, "weights 'a,b' are not numbers"),
        (("--weights", "1,2"), 2, "are not 1 finite numbers"),
        (("--option", "density"), 2, "option 'density' has no value"),
        (("--method", "ties", "--option", "density=2"), 2, "density=2 is not float in (0, 1]"),
        (("--save-dtype", "int4"), 2, "'int4' is not one of"),
        (("--method", "fisher"), 2, "needs fisher"),
    ],
)
def test_refusals(
    run: Any, tiny: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = run("merge", tiny, tiny, "-o", tmp_path / "out", *arguments)
    assert done.code == code and message in done.err and "fix:" in done.err
    assert not (tmp_path / "out").exists()


def test_two_models_and_no_base(run: Any, make_tiny: Any, tmp_path: Path) -> None:
    """`merge A B` would be a copy of B: it is refused with suggestions, and each of them works."""
    a, b, c = make_tiny(seed=0), make_tiny(seed=1), make_tiny(seed=2)
    for options in ((), ("--method", "slerp"), ("--method", "ties", "--option", "density=1")):
        done = run("merge", a, b, *options, "-o", tmp_path / "out")
        assert (
            done.code == 2
            and f"gives a copy of {b}" in done.err
            and not (tmp_path / "out").exists()
        )
        assert (
            f"demerge merge BASE {a} {b}" in done.err
            and f"demerge merge {a} {b} --no-base" in done.err
        )
    done = run("merge", a, b, "--option", "scale=0", "-o", tmp_path / "out")
    assert done.code == 2 and f"gives a copy of {a}" in done.err
    assert run("merge", a, b, "--weights", "1", "-o", tmp_path / "copy").code == 0
    one, other, copy = (load_file(folder / WEIGHTS) for folder in (a, b, tmp_path / "copy"))
    assert all((copy[name] == tensor).all() for name, tensor in other.items())
    done = run(
        "merge",
        a,
        b,
        c,
        "--no-base",
        "--method",
        "average",
        "--weights",
        "1,1,2",
        "-o",
        tmp_path / "mean",
    )
    assert done.code == 0 and "models  no base: " in done.err
    third, mean = load_file(c / WEIGHTS), load_file(tmp_path / "mean" / WEIGHTS)
    for name, tensor in mean.items():
        exact = (one[name].double() + other[name].double() + 2 * third[name].double()) / 4
        assert (tensor.double() - exact).abs().max() < 1e-6
    document = json.loads((tmp_path / "mean" / "demerge.json").read_text())
    assert document["no_base"] is True and len(document["experts"]) == 3
    assert "3 models, without a base" in (tmp_path / "mean" / "README.md").read_text()
    assert run("merge", "--recipe", tmp_path / "mean" / "demerge.json", "--verify").code == 0
    assert run("merge", a, b, "--no-base", "--method", "slerp", "-o", tmp_path / "slerp").code == 0
    (tmp_path / "r.yaml").write_text(f"experts: [{a}, {b}]\nno_base: true\nmethod: average\n")
    assert run("merge", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "from-recipe").code == 0
    for options in (("--method", "ties"), ("--weights", "1,1"), ("--method", "dare")):
        done = run("merge", a, b, "--no-base", *options, "-o", tmp_path / "out")
        assert done.code == 2 and "needs a base" in done.err and not (tmp_path / "out").exists()
    done = run("merge", a, "--no-base", "--method", "average", "-o", tmp_path / "out")
    assert done.code == 2 and "only one is given" in done.err and "needs a base" not in done.err


def test_rules_ranges_and_a_report(run: Any, make_tiny: Any, tmp_path: Path) -> None:
    base, a, b = make_tiny(seed=0), make_tiny(seed=1), make_tiny(seed=2)
    parts = (
        "--rule",
        "mid weights=0.2..0.8,0.5",
        "--rule",
        "up scale=0.5",
        "--only",
        "mid",
        "--only",
        "up",
    )
    ranges = ("--range", "0:500", "--range", "none")
    done = run(
        "merge",
        base,
        a,
        b,
        *parts,
        *ranges,
        "--report",
        "--num-workers",
        "2",
        "-o",
        tmp_path / "out",
    )
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "out"))
    for line in (
        "rule    mid weights=0.2..0.8,0.5: ",
        "rule    up scale=0.5: ",
        "only    mid, up: ",
        "0000-0500, weight 0.5",
    ):
        assert line in done.err
    assert (tmp_path / "out" / "report" / "index.html").is_file() and not (
        tmp_path / "out-report"
    ).exists()
    plan = json.loads(run("merge", base, a, b, *parts, "--dry-run", "--json").out)
    assert [rule["rule"] for rule in plan["rules"]] == ["mid weights=0.2..0.8,0.5", "up scale=0.5"]
    assert all(rule["tensors"] and rule["parameters"] for rule in plan["rules"])
    assert (
        plan["merged_tensors"] == sum(rule["tensors"] for rule in plan["rules"]) < plan["tensors"]
    )


def test_a_merge_by_flags_is_made_again_from_its_recipe(
    run: Any, make_tiny: Any, tmp_path: Path
) -> None:
    base, a, b = make_tiny(seed=0), make_tiny(seed=1), make_tiny(seed=2)
    out, document = tmp_path / "out", tmp_path / "out" / "demerge.json"
    assert (
        run(
            "merge",
            base,
            a,
            b,
            "--method",
            "dare",
            "--seed",
            "3",
            "--rule",
            "mid weights=0,1",
            "-o",
            out,
        ).code
        == 0
    )
    done = run("merge", "--recipe", document, "--verify", "--json")
    assert done.code == 0 and json.loads(done.out)["equal"] is True and "equal   unet/" in done.err
    assert run("merge", "--recipe", document, "-o", tmp_path / "again").code == 0
    assert run("merge", "--recipe", out / WEIGHTS, "--verify", "-o", tmp_path / "again").code == 0
    assert (tmp_path / "again" / "demerge.json").read_bytes() == document.read_bytes()
    other = run("merge", "--recipe", document, "--seed", "4", "-o", tmp_path / "other", "--json")
    assert json.loads(other.out)["recipe"]["seed"] == 4
    failed = run("merge", "--recipe", document, "--verify", "-o", tmp_path / "other")
    assert failed.code == 5 and "differs in" in failed.err
    data = bytearray((b / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (b / WEIGHTS).write_bytes(data)
    failed = run("merge", "--recipe", document, "--verify")
    assert (
        failed.code == 3 and b.name in failed.err and "is not what the recipe names" in failed.err
    )


def test_a_recipe_and_weights_of_files(run: Any, make_tiny: Any, tmp_path: Path) -> None:
    base, a = make_tiny(seed=0), make_tiny(seed=1)
    (tmp_path / "r.yaml").write_text(
        f"base: {base.name}\nexperts: [{a.name}]\nmethod: ties\nweights: [0.5]\n"
    )
    (tmp_path / "w.csv").write_text("name,expert\nmid,0.25\n*,1\n")
    done = run(
        "merge",
        "--recipe",
        tmp_path / "r.yaml",
        "--weights",
        tmp_path / "w.csv",
        "--dry-run",
        "--json",
    )
    recipe = json.loads(done.out)["recipe"]
    assert (recipe["method"], recipe["weights"], recipe["rules"]) == (
        "ties",
        [1.0],
        [{"match": "mid", "weights": [0.25]}],
    )
    lora = run("merge", base, a, "--lora-rank", "4", "-o", tmp_path / "lora", "--json")
    assert 0 < json.loads(lora.out)["adapter"]["share"] < 1
    assert (
        run("merge", base, tmp_path / "lora", "--weights", "1", "-o", tmp_path / "back").code == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rule", "middle scale=1"), "rule 'middle scale=1' matches no tensor"),
        (("--rule", "mid scale=1", "--rule", "mid.attn scale=2"), "is hidden"),
        (("--rule", "mid density=0.1", "--method", "ties"), "over the whole model"),
        (("--only", "nowhere"), "--only 'nowhere' matches no tensor"),
        (("--range", "0:1", "--range", "1:2"), "2 ranges for 1 experts"),
        (("--range", "a"), "'a' is not a timestep range"),
        (("--weights", "none.csv"), "none.csv: cannot be read"),
        (("--recipe", "r.yaml"), "from the command line or from --recipe"),
        (("--verify",), "--verify repeats the merge of a recipe"),
        (("--dry-run", "--report"), "--dry-run writes nothing"),
        (("--device", "warp"), "device 'warp' cannot be used"),
    ],
)
def test_refusals_of_parts(
    run: Any, tiny: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run("merge", tiny, tiny, "-o", tmp_path / "out", *arguments)
    assert done.code in (2, 3) and message in done.err and "fix:" in done.err
    assert not (tmp_path / "out").exists()


def test_the_help_has_groups_and_an_example(run: Any) -> None:
    text = run("merge", "--help").out
    for part in (
        "How to merge",
        "Which parts",
        "--rule",
        "--recipe",
        "--report",
        "demerge merge base",
    ):
        assert part in text


def test_refusals_of_files(run: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>")
    for arguments, message in [
        ((tiny, tmp_path / "nowhere", "-o", tmp_path / "out"), "no such file"),
        ((tiny, tmp_path / "page.safetensors", "-o", tmp_path / "out"), "a web page"),
    ]:
        done = run("merge", *arguments)
        assert done.code == 3 and message in done.err
    done = run("merge", tiny, tiny, "-o", tiny)
    assert done.code == 2 and "exists already" in done.err
    assert run("merge", tiny, tiny).code == 2


def test_methods_are_listed(run: Any) -> None:
    methods = {m["name"]: m for m in json.loads(run("methods", "--json").out)["methods"]}
    assert set(methods) >= {"average", "task_arithmetic", "ties", "dare", "fisher"}
    assert methods["average"]["aliases"] == ["linear"]
    assert (
        methods["ties"]["options"]["density"]["default"] == 0.2
        and methods["ties"]["paper"] == "arXiv 2306.01708"
    )
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
