"""`demerge transfer`: what it prints and writes, which experts it takes, and how it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from demerge.conflict import ConflictMap
from demerge.timesteps import Partition

Run = Callable[..., Any]
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def measured(tiny: Path, place: Path, **settings: Any) -> Path:
    """Save a map of the tiny base, of four bins, as `demerge analyze` leaves it."""
    from demerge.analysis import MeasurementOptions, measure
    from demerge.data import load_images
    from demerge.diffusion.model import Diffusion

    data = load_images("digits", split="train", resolution=8, channels=1)
    map = measure(
        Diffusion.load(tiny), data, MeasurementOptions(bins=4, groups=5, batch_size=2, **settings)
    )
    return map.save(place / "conflict.safetensors")


@pytest.fixture(scope="session")
def conflict(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map with sketches of layers."""
    return measured(tiny, tmp_path_factory.mktemp("map"), layers=True)


@pytest.fixture
def experts(tmp_path: Path, add_expert: Callable[..., Path]) -> list[Path]:
    """Two experts, their weights a little moved."""
    made = [
        add_expert(tmp_path / "experts" / f"{a:04d}-{b:04d}", a, b)
        for a, b in ((0, 250), (250, 1000))
    ]
    for i, expert in enumerate(made):
        g = torch.Generator().manual_seed(i)
        tensors = load_file(expert / WEIGHTS)
        save_file(
            {n: t + 0.02 * torch.randn(t.shape, generator=g) for n, t in tensors.items()},
            expert / WEIGHTS,
        )
    return made


def test_a_table_for_a_person(run: Run, conflict: Path, tiny: Path, experts: list[Path]) -> None:
    done = run("transfer", conflict, *experts, "--base", tiny)
    assert done.code == 0, done.err
    verdict, *lines = done.out.splitlines()
    assert "losses fall" in verdict
    assert lines[0].split()[-3:] == ["0000-0250", "0250-1000", "all"]
    assert [line.split()[0] for line in lines[1:3]] == ["0000-0250", "0250-1000"] and lines[
        1
    ].count("±") == 3
    for words in (
        "negative: the whole task vector lowers",
        "unresolved, the 95 % interval",
        "first order only",
        "layers  ",
    ):
        assert words in done.out
    assert "4 bins, 5 groups of 2" in done.err


def test_files_and_documents(
    run: Run, conflict: Path, tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run("transfer", conflict.parent, *experts, "--base", tiny, "-o", out)
    assert (done.code, done.out.strip()) == (0, str(out)) and "first order only" in done.err
    assert sorted(path.name for path in out.iterdir()) == [
        "transfer.json",
        "transfer.png",
        "transfer.svg",
        "transfer.yaml",
    ]
    made = json.loads((out / "transfer.json").read_text())
    assert (made["format"], made["ranges"]) == ("demerge.transfer/1", [[0, 250], [250, 1000]])
    cell = made["experts"][1]["ranges"]["0000-0250"]
    assert (
        set(cell) == {"change", "se", "sketch", "half", "resolved"}
        and cell["sketch"] == 0 < cell["se"]
    )
    layers = made["layers"]
    assert (
        np.allclose(np.sum(layers["change"], 1)[1, 0], cell["change"], rtol=0.5)
        and "conv_in" in layers["names"]
    )
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    said = json.loads(
        run("transfer", conflict.parent, *experts, "--base", tiny, "-o", out, "--json").out
    )
    assert {name: value for name, value in said.items() if name not in ("out", "files")} == made
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".yaml"} == {
        name: content for name, content in kept.items() if name != "transfer.yaml"
    }


def test_ranges_of_ones_own_and_every_kind_of_expert(
    run: Run, conflict: Path, tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    """A pipeline, its component, its file and its LoRA are one expert; the base changes nothing."""
    Partition.from_cuts(1000, [300]).save(tmp_path / "p.json")
    lora = tmp_path / "lora.safetensors"
    assert (
        run("merge", tiny, experts[0], "--weights", "1", "--lora-rank", 400, "-o", lora).code == 0
    )
    shutil.copy(experts[0] / WEIGHTS, tmp_path / "file.safetensors")
    asked = (experts[0], experts[0] / "unet", tmp_path / "file.safetensors", lora, tiny)
    done = run(
        "transfer", conflict, *asked, "--base", tiny, "--ranges", tmp_path / "p.json", "--json"
    )
    assert done.code == 0 and "300 within bins of the map" in done.err, done.err
    rows = json.loads(done.out)["experts"]
    changes = [[cell["change"] for cell in row["ranges"].values()] for row in rows]
    assert changes[0] == changes[1] == changes[2] and changes[4] == [0, 0] and rows[4]["norm"] == 0
    assert [row["name"] for row in rows] == [
        "0000-0250",
        "unet",
        "file.safetensors",
        "lora.safetensors",
        "base",
    ]
    assert 0 < rows[3]["norm"] < 1.001 * rows[0]["norm"]


def test_a_map_of_some_parameters_restricts_task_vectors(
    run: Run, tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    map = measured(tiny, tmp_path / "map", params="attentions")
    done = run("transfer", map, *experts, "--base", tiny)
    assert (
        done.code == 0 and "only what the map was measured on counts, params attentions" in done.err
    )
    assert "not counted: 0000-0250" in done.out and "layers" not in done.out


@pytest.fixture
def changed(conflict: Path, tmp_path: Path) -> Callable[..., Path]:
    """Save the map with changes: changed(sketches=None, layers=None, layout={}) -> file."""
    return lambda **changes: replace(ConflictMap.load(conflict), **changes).save(
        tmp_path / "changed.safetensors"
    )


def test_maps_that_do_not_serve(
    run: Run,
    conflict: Path,
    changed: Callable[..., Path],
    tiny: Path,
    make_tiny: Callable[..., Path],
    experts: list[Path],
) -> None:
    origin = ConflictMap.load(conflict).origin
    for map, base, message in (
        (changed(sketches=None, layers=None, layout={}), tiny, "holds no sketches"),
        (conflict, make_tiny(seed=1), "was measured on a model of sha256"),
        (conflict.parent / "none", tiny, "not a conflict map"),
    ):
        done = run("transfer", map, *experts, "--base", base)
        assert (done.code, message in done.err, "fix:" in done.err) == (3, True, True), done.err
    done = run("transfer", changed(origin=replace(origin, metric="adam")), *experts, "--base", tiny)
    assert (done.code, "is in the adam metric" in done.err) == (3, True)


def test_experts_and_ranges_that_do_not_fit(
    run: Run,
    conflict: Path,
    tiny: Path,
    make_tiny: Callable[..., Path],
    experts: list[Path],
    tmp_path: Path,
) -> None:
    wide = make_tiny(block_out_channels=(4, 8))
    for asked, code, message in (
        ((experts[0],), 2, "--ranges"),
        ((wide, "--ranges", "joint"), 3, "of another shape"),
        ((tmp_path / "nowhere", "--ranges", "joint"), 3, "nowhere"),
        ((*experts, "--ranges", "unifrom:2"), 2, "neither uniform:N"),
    ):
        done = run("transfer", conflict, *asked, "--base", tiny)
        assert (done.code, message in done.err, "fix:" in done.err, done.out) == (
            code,
            True,
            True,
            "",
        ), done.err
    record = experts[0] / "expert.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "base_sha256": "0" * 64}))
    done = run("transfer", conflict, *experts, "--base", tiny)
    assert (done.code, "was finetuned from a base of sha256" in done.err) == (3, True)


@pytest.mark.parametrize("ranges", [(), ("--ranges", "uniform:2")], ids=["own", "given"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named_before_ranges(
    run: Run,
    conflict: Path,
    tiny: Path,
    experts: list[Path],
    ranges: tuple[str, ...],
    number: float,
) -> None:
    broken = experts[1] / WEIGHTS
    tensors = load_file(broken)
    tensors["conv_in.weight"][0] = number
    save_file(tensors, broken)
    done = run("transfer", conflict, experts[1], "--base", tiny, *ranges)
    assert (done.code, f"{broken}: tensor 'conv_in.weight' holds NaN or Inf" in done.err) == (
        3,
        True,
    ), done.err


def test_a_map_cut_short_is_refused(
    run: Run, conflict: Path, tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    cut = tmp_path / "conflict.safetensors"
    for size in (0, 4, 1000, conflict.stat().st_size - 9):
        cut.write_bytes(conflict.read_bytes()[:size])
        for command in (
            ("transfer", cut, *experts, "--base", tiny),
            ("layers", cut),
            ("ranges", cut),
        ):
            done = run(*command)
            assert (done.code, f"{cut}: not a conflict map: truncated" in done.err) == (3, True), (
                done.err
            )
            assert "remove it and measure it again" in done.err


def test_what_is_there_is_not_replaced(
    run: Run, conflict: Path, tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "transfer.json").write_text('{"mine": 1}')
    for out in (file, folder):
        done = run("transfer", conflict, *experts, "--base", tiny, "-o", out)
        assert (done.code, "exists and is not" in done.err) == (2, True)
    assert file.read_text() == "mine" and [path.name for path in folder.iterdir()] == [
        "transfer.json"
    ]
