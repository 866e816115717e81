"""`demerge stats`: what it writes, that it is done once, its errors, and that `merge` takes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from demerge.storage.checkpoint import Checkpoint

Run = Callable[..., Any]
QUICK = ("--data", "digits", "--samples", 3, "--device", "cpu")


@pytest.fixture
def experts(tiny: Path, tmp_path: Path, add_expert: Callable[..., Path]) -> list[Path]:
    """Two experts, the weights of the second a little moved."""
    made = [
        add_expert(tmp_path / "experts" / f"{a:04d}-{b:04d}", a, b)
        for a, b in ((0, 500), (500, 1000))
    ]
    for i, expert in enumerate(made):
        file = expert / "unet" / "diffusion_pytorch_model.safetensors"
        g = torch.Generator().manual_seed(i)
        save_file(
            {n: t + 0.01 * torch.randn(t.shape, generator=g) for n, t in load_file(file).items()},
            file,
        )
    return made


def test_experts_get_statistics_that_merge_finds(
    run: Run, tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    done = run("stats", *experts, *QUICK)
    assert done.code == 0, done.err
    assert "4 x 3 samples: at most some" in done.err
    for expert, span in zip(experts, ([0, 500], [500, 1000]), strict=True):
        record = json.loads((expert / "stats.json").read_text())
        assert record["fisher"]["inputs"]["range"] == record["gram"]["inputs"]["range"] == span
        assert record["fisher"]["options"] == {"samples": 3, "seed": 0}
        assert set(Checkpoint.open(expert / "fisher.safetensors")) == set(Checkpoint.open(expert))
        assert set(Checkpoint.open(expert / "gram.safetensors")) < set(Checkpoint.open(expert))
    for method, name in (("fisher", "fisher"), ("regmean", "gram")):
        merged = run("merge", tiny, *experts, "--method", method, "-o", tmp_path / method)
        assert merged.code == 0, merged.err
        recipe = json.loads((tmp_path / method / "demerge.json").read_text())
        assert [list(e["inputs"]) for e in recipe["experts"]] == [[name], [name]]
    weights = [
        load_file(tmp_path / m / "unet" / "diffusion_pytorch_model.safetensors")
        for m in ("fisher", "regmean")
    ]
    name = "mid_block.attentions.0.to_q.weight"
    assert not torch.equal(weights[0][name], weights[1][name])


def test_the_same_again_does_nothing_and_what_is_missing_is_made(
    run: Run, experts: list[Path]
) -> None:
    one = experts[0]
    assert run("stats", one, *QUICK, "--statistics", "fisher").code == 0
    assert not (one / "gram.safetensors").exists()
    written = (one / "fisher.safetensors").stat().st_mtime_ns
    again = run("stats", one, *QUICK, "--statistics", "fisher")
    assert again.code == 0
    assert "cost    nothing" in again.err
    both = json.loads(run("stats", one, *QUICK, "--json").out)
    assert (both["files"], both["found"]) == (
        [str(one / "gram.safetensors")],
        [str(one / "fisher.safetensors")],
    )
    assert (one / "fisher.safetensors").stat().st_mtime_ns == written
    (one / "fisher.safetensors").unlink()  # as a kill between record and tensors leaves it
    assert run("stats", one, *QUICK).code == 0
    assert (one / "fisher.safetensors").is_file()


def test_finetune_leaves_what_stats_would(run: Run, tiny: Path, tmp_path: Path) -> None:
    train = (
        "--max-train-steps",
        1,
        "--train-batch-size",
        2,
        "--ranges",
        "uniform:1",
        "--save-dtype",
        "float16",
    )
    out = tmp_path / "e"
    assert (
        run(
            "finetune",
            tiny,
            "--data",
            "digits",
            *train,
            "--fisher-samples",
            3,
            "-o",
            out,
            "--device",
            "cpu",
        ).code
        == 0
    )
    expert = out / "0000-1000"
    assert "cost    nothing" in run("stats", expert, *QUICK, "--statistics", "fisher").err
    kept = (expert / "fisher.safetensors").read_bytes()
    (expert / "fisher.safetensors").unlink()
    assert run("stats", expert, *QUICK, "--statistics", "fisher").code == 0
    assert (expert / "fisher.safetensors").read_bytes() == kept


def test_ranges_of_any_model_go_into_folders(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("stats", tiny, *QUICK, "--ranges", "uniform:2", "-o", out)
    assert (done.code, done.out.strip()) == (0, str(out))
    names = ["0000-0500", "0500-1000", "stats.yaml"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert sorted(p.name for p in (out / "0500-1000").iterdir()) == [
        "fisher.safetensors",
        "gram.safetensors",
        "stats.json",
    ]
    one = tmp_path / "one"
    single = ("--ranges", "0:500", "-o", one, "--statistics", "fisher")
    assert run("stats", tiny, *QUICK, *single).code == 0
    same = (one / "0000-0500" / "fisher.safetensors").read_bytes()
    assert same == (out / "0000-0500" / "fisher.safetensors").read_bytes()


REFUSED = [
    (("--samples", 4), 2, "samples was 3, now 4"),
    (("--seed", 1), 2, "seed was 0, now 1"),
    (("--split", "test"), 2, "data_fingerprint was '"),
    (("--ranges", "0:250"), 2, "range was [0, 500], now [0, 250]"),
    (("--statistics", "fisher,hessian"), 2, "statistic 'hessian' is unknown"),
    (("--ranges", "uniform:2"), 2, "2 ranges do not fit next to one expert"),
    (("--ranges", "unifrom:2"), 2, "neither uniform:N"),
    (("--ranges", "0:2000", "-o", "new"), 2, "3 samples of 0000-2000 cannot be drawn"),
    (("--data", "/nowhere"), 3, "/nowhere"),
]


def test_refusals(run: Run, experts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(experts[0].parent)
    assert run("stats", experts[0], *QUICK, "--statistics", "fisher").code == 0
    for changes, code, message in REFUSED:
        done = run("stats", experts[0], *QUICK, "--statistics", "fisher", *changes)
        assert (done.code, message in done.err, "fix:" in done.err) == (code, True, True), done.err


def test_other_weights_are_other_statistics(run: Run, experts: list[Path], tmp_path: Path) -> None:
    one, two = experts
    assert run("stats", one, *QUICK, "--statistics", "fisher").code == 0
    shutil.copyfile(*(e / "unet" / "diffusion_pytorch_model.safetensors" for e in (two, one)))
    assert "model_sha256 was" in run("stats", one, *QUICK, "--statistics", "fisher").err
    (one / "stats.json").unlink()  # the file says it, too
    assert "model_sha256 was" in run("stats", one, *QUICK, "--statistics", "fisher").err
    save_file(load_file(one / "fisher.safetensors"), one / "fisher.safetensors")
    done = run("stats", one, *QUICK, "--statistics", "fisher")
    assert (done.code, "is not recorded in stats.json" in done.err) == (3, True)


def test_models_without_a_range_or_a_place_are_refused(
    run: Run, tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    assert "has no expert.json that names its range" in run("stats", tiny, *QUICK).err
    assert "no output is named" in run("stats", tiny, *QUICK, "--ranges", "joint").err
    twice = run("stats", experts[0], experts[0], *QUICK)
    assert (twice.code, "2 models have" in twice.err) == (2, True)
