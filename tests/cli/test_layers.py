"""`demerge layers`: from a stored map to experts that train what it chose, and how it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demerge.conflict import ConflictMap, Origin, layers_of
from demerge.diffusion.model import Diffusion
from demerge.storage.checkpoint import Checkpoint
from demerge.timesteps import Partition

CHOSEN = ["conv_out", "mid_block.resnets.0.norm1"]
TRAIN = ("--data", "digits", "--max-train-steps", 2, "--train-batch-size", 2, "--device", "cpu")


@pytest.fixture
def conflict(tiny: Path, tmp_path: Path) -> Path:
    """A stored map of the tiny base: two layers gain, by much, from a cut at 500."""
    base = Diffusion.load(tiny)
    layout = {name: p.numel() for name, p in base.denoiser.named_parameters()}
    widths, rng = [min(509, size) for size in layers_of(layout).values()], np.random.default_rng(0)
    strong = np.repeat([name in CHOSEN for name in layers_of(layout)], widths)
    turn = np.where(np.arange(4) < 2, 1.0, -1.0)[:, None, None]
    layers = (3 * turn * strong + 0.3 * rng.standard_normal((4, 8, sum(widths)))).astype(np.float32)
    s = rng.standard_normal((4, 8, 12))
    origin = Origin(base.sha256, "data", base.parameters, "exact", "shared", False, "adam", 4, 0)
    gram = np.einsum("imd,jnd->imjn", s, s)
    map = ConflictMap(
        Partition.uniform(1000, 4), gram, base.snr().log().numpy(), origin, layout, layers=layers
    )
    return map.save(tmp_path / "conflict.safetensors")


def test_from_a_map_to_experts(run: Any, tiny: Path, conflict: Path, tmp_path: Path) -> None:
    out, plot, experts = tmp_path / "layers.json", tmp_path / "layers.svg", tmp_path / "experts"
    done = run(
        "layers",
        conflict,
        "--ranges",
        "uniform:2",
        "--share",
        0.02,
        "--model",
        tiny,
        "-o",
        out,
        "--plot",
        plot,
    )
    assert (done.code, done.out.strip()) == (0, str(out)), done.err
    assert "held out, they gain" in done.err and plot.read_bytes().startswith(b"<?xml")
    said = json.loads(out.read_text())
    assert said["train"][:2] == CHOSEN[::-1] or said["train"][:2] == CHOSEN
    assert said["supported"] and said["trained"] <= 0.02
    kept = out.read_bytes()
    assert (
        run("layers", tmp_path, "--ranges", "uniform:2", "--share", 0.02, "-o", out).code == 0
        and out.read_bytes() == kept
    )
    trained = ("finetune", tiny, "--train-layers", out, *TRAIN, "-o", experts)
    plan = run(*trained, "--dry-run", "--json")
    document = json.loads(plan.out)
    assert document["trained_parameters"] <= 0.02 * document["parameters"]
    assert "chosen for the ranges 0000-0500 0500-1000" in plan.err
    assert run(*trained, "--ranges", "joint").code == 0
    record = json.loads((experts / "0000-1000" / "expert.json").read_text())
    assert record["train_layers"] == said["train"]
    base, expert = Checkpoint.open(tiny), Checkpoint.open(experts / "0000-1000")
    moved = {name for name in base if not torch.equal(base[name], expert[name])}
    assert set(layers_of(dict.fromkeys(moved, 1))) == set(said["train"])
    again = run("finetune", tiny, *TRAIN, "--ranges", "joint", "-o", experts)
    assert again.code == 2 and "layers_sha256" in again.err
    foreign = run(
        "finetune", tiny, "--init", "random", "--train-layers", out, *TRAIN, "-o", tmp_path / "new"
    )
    assert foreign.code == 2 and "random start trains all layers" in foreign.err


def test_what_scripts_rely_on(run: Any, conflict: Path) -> None:
    done = run("layers", conflict, "--ranges", "uniform:2", "--share", 0.02)
    assert (done.code, set(CHOSEN) <= set(done.out.split())) == (0, True)
    said = json.loads(
        run("layers", conflict, "--ranges", "uniform:2", "--share", 0.02, "--json").out
    )
    assert said["train"] == done.out.split() and said["out"] is None
    assert sum(row["parameters"] for row in said["layers"]) > 10_000


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--share", 0), 2, "share is 0.0"),
        (("--share", 1e-6), 2, "no layer fits"),
        (("--ranges", "unifrom:2"), 2, "neither uniform:N"),
        (("--ranges", "uniform:\N{SUPERSCRIPT TWO}"), 2, "neither uniform:N"),
        (("--ranges", "joint"), 2, "one range decouples nothing"),
        (("--ranges", "uniform:5"), 2, "holds no whole bin"),
        (("--model", "nowhere"), 3, "nowhere"),
        (("--plot", "layers.pdf"), 2, "neither .svg nor .png"),
        (("-o", "conflict.safetensors"), 2, "is not a choice of layers"),
        (("-o", "conflict.safetensors/l.json"), 2, "cannot exist"),
        (("--plot", "conflict.safetensors/l.svg"), 2, "cannot exist"),
        (("-o", "."), 2, "is not a choice of layers"),
    ],
)
def test_mistakes_end_in_one_message(
    run: Any,
    conflict: Path,
    arguments: tuple[Any, ...],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(conflict.parent)
    before = conflict.read_bytes()
    done = run("layers", conflict, *arguments)
    assert (done.code, message in done.err, done.out) == (code, True, ""), done.err
    assert [path.name for path in conflict.parent.iterdir()] == [
        conflict.name
    ] and conflict.read_bytes() == before


def test_ranges_of_another_number_of_timesteps_are_refused(
    run: Any, conflict: Path, tmp_path: Path
) -> None:
    Partition.uniform(500, 2).save(tmp_path / "p.json")
    done = run("layers", conflict, "--ranges", tmp_path / "p.json")
    assert (done.code, "covers 500 timesteps" in done.err) == (2, True)


def test_a_map_without_layers_says_how_to_measure_them(run: Any, conflict: Path) -> None:
    replace(ConflictMap.load(conflict), layers=None).save(conflict)
    done = run("layers", conflict)
    assert (done.code, "--layers" in done.err) == (3, True)
