"""`demerge landscape`: experts compared, losses around their base, files, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from demerge.data import load_images
from demerge.diffusion.model import Diffusion
from demerge.evaluation.metrics.range_losses import range_losses
from demerge.timesteps import Partition

Run = Callable[..., Any]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
QUICK: tuple[Any, ...] = ("--data", "digits", "--samples", 16, "--points", 1, "--device", "cpu")


@pytest.fixture
def experts(add_expert: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """Two experts of the tiny base, for [0, 300) and [300, 1000), with other weights."""
    made = []
    for seed, span in enumerate([(0, 300), (300, 1000)]):
        folder = add_expert(tmp_path / f"expert-{seed}", *span)
        g = torch.Generator().manual_seed(seed)
        tensors = {
            n: t + 0.02 * torch.randn(t.shape, generator=g)
            for n, t in load_file(folder / WEIGHTS).items()
        }
        save_file(tensors, folder / WEIGHTS)
        made.append(folder)
    return made


def test_paths_plane_and_task_vectors(
    run: Run, tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "land"
    done = run("landscape", tiny, *experts, *QUICK, "-o", out, "--json")
    assert done.code == 0, done.err
    made, printed = json.loads((out / "landscape.json").read_text()), json.loads(done.out)
    assert {n: v for n, v in printed.items() if n not in ("out", "files")} == made
    assert {*printed["files"], str(out / "landscape.yaml")} == set(map(str, out.iterdir()))
    names = [
        "loss_along_path_0",
        "loss_along_path_1",
        "loss_on_plane",
        "norms_by_block",
        "norms_by_layer",
    ]
    assert (
        sorted(path.stem for path in out.glob("*.svg"))
        == sorted(path.stem for path in out.glob("*.png"))
        == names
    )
    assert done.err.index("cost    704 forward passes") < done.err.index("length by block")
    spans = ["0000-0300", "0300-1000"]
    assert (
        list(made["paths"]) == made["task_vectors"]["labels"] == made["plane"]["experts"] == spans
    )
    for path in made["paths"].values():
        assert [(row["s"], row["range"]) for row in path] == [
            (s, span) for s in (0, 1, 2) for span in spans
        ]
    points = {(row["w_i"], row["w_j"]) for row in made["plane"]["points"]}
    assert points == {(float(i), float(j)) for i in (-1, 0, 1, 2) for j in (-1, 0, 1, 2)}
    assert made["record"]["inputs"]["split"] == "test"
    assert "covers 0" in done.err or "±" in done.err


def test_the_numbers_are_those_of_the_library(
    run: Run, tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    done = run("landscape", tiny, *experts, *QUICK, "--plane", "none", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    base, *tuned = (load_file(place / WEIGHTS) for place in (tiny, *experts))
    tau = [torch.cat([(t[n].double() - base[n].double()).flatten() for n in base]) for t in tuned]
    compared = made["task_vectors"]
    assert compared["norms"] == pytest.approx([float(each.norm()) for each in tau])
    assert compared["cosine"][0][1] == pytest.approx(
        float(tau[0] @ tau[1] / tau[0].norm() / tau[1].norm())
    )
    layers = {row["name"]: row for row in compared["layers"]}
    assert list(layers) == list(
        dict.fromkeys(name.rpartition(".")[0] for name in compared_names(tiny))
    )
    conv = [
        (tuned[0][f"conv_in.{part}"].double() - base[f"conv_in.{part}"].double())
        for part in ("weight", "bias")
    ]
    assert layers["conv_in"]["norm 0000-0300"] == pytest.approx(
        sum(float(c.square().sum()) for c in conv) ** 0.5
    )
    data = load_images("digits", split="test", resolution=8, channels=1)
    ranges = Partition.from_cuts(1000, [300])
    start, end = (
        range_losses(Diffusion.load(m), data, ranges, samples=16) for m in (tiny, experts[0])
    )
    change = end.change(start)
    for row in made["paths"]["0000-0300"]:
        if row["s"] == 1:
            own = change[row["range"]]
            assert (row["change"], row["se"]) == pytest.approx((own.value, own.se), rel=1e-4)
    assert made["plane"] is None and done.err.count("plane   none") == 1


def compared_names(folder: Path) -> list[str]:
    """The tensors of a model in the order of its file."""
    from demerge.storage.checkpoint import Checkpoint

    return list(Checkpoint.open(folder))


def test_a_path_to_a_merged_model(run: Run, tiny: Path, experts: list[Path]) -> None:
    done = run(
        "landscape", tiny, *experts, *QUICK, "--merged", experts[0], "--plane", "1,0", "--json"
    )
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert list(made["paths"]) == ["expert-0"] and made["plane"]["experts"] == [
        "0300-1000",
        "0000-0300",
    ]
    at = {(row["w_i"], row["w_j"], row["range"]): row["loss"] for row in made["plane"]["points"]}
    for row in made["paths"]["expert-0"]:
        assert row["loss"] == pytest.approx(at[0.0, row["s"], row["range"]], rel=1e-4)


def test_one_expert_has_a_path_and_no_plane(run: Run, tiny: Path, experts: list[Path]) -> None:
    done = run("landscape", tiny, experts[0], *QUICK, "--ranges", "uniform:2", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert made["plane"] is None and list(made["paths"]) == ["0000-0300"] and made["files"] == []
    assert (
        made["task_vectors"]["cosine"] == [[pytest.approx(1)]]
        and made["task_vectors"]["blocks"][0]["cosine"] is None
    )


def test_a_lora_is_an_expert(run: Run, tiny: Path, experts: list[Path], tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    assert run("merge", tiny, experts[0], "--weights", "1", "--lora-rank", 4, "-o", lora).code == 0
    done = run("landscape", tiny, lora, *QUICK, "--ranges", "joint", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert made["task_vectors"]["norms"][0] > 0 and list(made["paths"]) == ["0000-0300"]


def test_an_expert_that_is_the_base_moves_nothing(
    run: Run, tiny: Path, experts: list[Path]
) -> None:
    done = run("landscape", tiny, tiny, experts[0], *QUICK, "--ranges", "joint", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert made["task_vectors"]["norms"][0] == 0 and made["task_vectors"]["cosine"][0] == [
        None,
        None,
    ]
    assert all(row["change"] == 0 for row in made["paths"]["base"])


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (("--plane", "0,2"), 2, "takes two different experts, and 2 are given"),
        (("--plane", "1,1"), 2, "takes two different experts"),
        (("--plane", "both"), 2, "does not name two experts"),
        (("--ranges", "unifrom:2"), 2, "neither uniform:N"),
        (("--split", "none"), 2, "'none' is not one of"),
        (("--data", "/nowhere"), 3, "/nowhere"),
        (("--merged", "/nowhere"), 3, "/nowhere"),
        (("-o", "there"), 2, "exists already"),
    ],
)
def test_refusals(
    run: Run,
    tiny: Path,
    experts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: tuple[Any, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    (Path("there") / "file").write_text("")
    done = run("landscape", tiny, *experts, *QUICK, *changes)
    assert (done.code, "fix:" in done.err) == (code, True), done.err
    assert message in done.err


def test_one_expert_for_a_plane_and_experts_without_ranges_are_refused(
    run: Run, tiny: Path, experts: list[Path]
) -> None:
    done = run("landscape", tiny, experts[0], *QUICK, "--plane", "0,1")
    assert (done.code, "two different experts, and 1 is given" in done.err) == (2, True)
    done = run("landscape", tiny, experts[1], *QUICK)
    assert (done.code, "--ranges" in done.err) == (2, True)


def test_experts_of_other_bases_and_shapes_are_refused(
    run: Run, tiny: Path, experts: list[Path], make_tiny: Callable[..., Path]
) -> None:
    other = make_tiny(block_out_channels=(4, 8))
    done = run("landscape", tiny, other, *QUICK, "--ranges", "joint")
    assert (done.code, f"{other} does not fit {tiny}" in done.err) == (3, True), done.err
    record = experts[0] / "expert.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "base_sha256": "0" * 64}))
    done = run("landscape", tiny, *experts, *QUICK)
    assert (done.code, "was finetuned from a base of sha256" in done.err) == (3, True)
