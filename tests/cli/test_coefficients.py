"""`demerge coefficients`: what it prints and writes, that merge takes it, and its errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Run = Callable[..., Any]
QUICK = ("--data", "digits", "--samples", 10, "--groups", 5, "--device", "cpu")
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def experts(tmp_path: Path, add_expert: Callable[..., Path]) -> list[Path]:
    """Two experts, their weights a little moved."""
    made = [
        add_expert(tmp_path / "experts" / f"{a:04d}-{b:04d}", a, b)
        for a, b in ((0, 300), (300, 1000))
    ]
    for i, expert in enumerate(made):
        g = torch.Generator().manual_seed(i)
        tensors = load_file(expert / WEIGHTS)
        save_file(
            {n: t + 0.02 * torch.randn(t.shape, generator=g) for n, t in tensors.items()},
            expert / WEIGHTS,
        )
    return made


def test_weights_come_with_a_prediction_and_merge_takes_them(
    run: Run, tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "w.json"
    done = run("coefficients", tiny, *experts, *QUICK, "-o", file)
    assert (done.code, done.out.strip()) == (0, str(file)), done.err
    assert done.err.index("cost    100 samples through the model for 2 weights") < done.err.index(
        "predicted change"
    )
    assert "predicted: the loss over all ranges" in done.err or "weights harm" in done.err
    made = json.loads(file.read_text())
    record = made["record"]
    assert len(made["weights"]) == 2
    assert (
        list(record["predicted"]["ranges"])
        == list(record["base_loss"])
        == ["0000-0300", "0300-1000"]
    )
    assert record["inputs"]["split"] == "train"
    assert record["options"]["samples"] == 10
    assert record["fitted"] <= 0
    merged = tmp_path / "merged"
    assert run("merge", tiny, *experts, "--weights", file, "-o", merged).code == 0
    base, a, b = (load_file(place / WEIGHTS)["conv_in.weight"] for place in (tiny, *experts))
    wanted = base + made["weights"][0] * (a - base) + made["weights"][1] * (b - base)
    torch.testing.assert_close(load_file(merged / WEIGHTS)["conv_in.weight"], wanted)


def test_weights_per_block(run: Run, tiny: Path, experts: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    done = run(
        "coefficients",
        tiny,
        *experts,
        *QUICK,
        "--samples",
        5,
        "--granularity",
        "block",
        "--ridge",
        0.1,
        "--relative",
        "-o",
        file,
        "--json",
    )
    assert done.code == 0, done.err
    printed, made = json.loads(done.out), json.loads(file.read_text())
    assert {n: v for n, v in printed.items() if n != "out"} == made
    assert list(made["blocks"]) == ["in", "time", "down.0", "down.1", "mid", "up.0", "up.1", "out"]
    assert made["record"]["ridge"] == 0.1
    merged = tmp_path / "merged"
    assert run("merge", tiny, *experts, "--weights", file, "-o", merged).code == 0
    base, a, b = (load_file(place / WEIGHTS)["conv_in.weight"] for place in (tiny, *experts))
    first, second = made["blocks"]["in"]
    torch.testing.assert_close(
        load_file(merged / WEIGHTS)["conv_in.weight"],
        base + first * (a - base) + second * (b - base),
    )


ONE_LEVEL = {  # half the layers
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


def test_weights_per_layer(run: Run, make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    tiny, expert = (make_tiny(seed=seed, **ONE_LEVEL) for seed in (0, 1))
    file = tmp_path / "w.json"
    done = run(
        "coefficients",
        tiny,
        expert,
        *QUICK,
        "--ranges",
        "joint",
        "--samples",
        5,
        "--granularity",
        "layer",
        "-o",
        file,
    )
    assert done.code == 0, done.err
    made, names = json.loads(file.read_text())["blocks"], list(load_file(tiny / WEIGHTS))
    assert set(made) == {name.rpartition(".")[0] for name in names}
    assert f"samples through the model for {len(made)} weights" in done.err
    assert f"of {len(made)} layers:" in done.err
    merged = tmp_path / "merged"
    assert run("merge", tiny, expert, "--weights", file, "-o", merged).code == 0
    base, moved, result = (load_file(place / WEIGHTS) for place in (tiny, expert, merged))
    for name in names:
        (w,) = made[name.rpartition(".")[0]]
        torch.testing.assert_close(result[name], base[name] + w * (moved[name] - base[name]))


def test_the_same_again_is_the_same_to_the_byte(
    run: Run, tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    contents = []
    for i, seed in enumerate((0, 0, 1)):
        file = tmp_path / f"{i}.json"
        options = ("--ranges", "joint", "--samples", 5, "--seed", seed, "-o", file)
        assert run("coefficients", tiny, experts[0], *QUICK, *options).code == 0
        contents.append(file.read_bytes())
    assert contents[0] == contents[1] != contents[2]
    assert json.loads(contents[0])["weights"] != json.loads(contents[2])["weights"]


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (("-o", "w.txt"), 2, "is not a name for a file of weights"),
        (("-o", "there.json"), 2, "exists already"),
        (("--granularity", "tensor"), 2, "'tensor' is not one of"),
        (("--ranges", "unifrom:2"), 2, "neither uniform:N"),
        (("--samples", 4), 2, "4 samples per range do not fill 5 groups"),
        (
            ("--split", "test", "--groups", 1000, "--samples", 2000),
            2,
            "images do not fill 1000 groups",
        ),
        (("--step", 0), 2, "step is 0.0"),
        (("--split", "none"), 2, "'none' is not one of"),
        (("--data", "/nowhere"), 3, "/nowhere"),
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
    Path("there.json").write_text("{}")
    done = run("coefficients", tiny, *experts, *QUICK, "-o", "w.json", *changes)
    assert (done.code, "fix:" in done.err) == (code, True), done.err
    assert message in done.err
    assert not Path("w.json").exists()


def test_experts_whose_ranges_make_no_partition_need_ranges(
    run: Run, tiny: Path, experts: list[Path], make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = ("-o", tmp_path / "w.json")
    for some in (experts[1:], experts[:1], [tiny]):
        done = run("coefficients", tiny, *some, *QUICK, *out)
        assert done.code == 2
        assert "--ranges" in done.err
    assert run("coefficients", tiny, experts[1], *QUICK, "--ranges", "joint", *out).code == 0


def test_numbers_that_are_not_finite_are_named_before_ranges(
    run: Run, tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    broken = experts[1] / WEIGHTS
    tensors = load_file(broken)
    tensors["conv_in.weight"][0] = float("nan")
    save_file(tensors, broken)
    done = run("coefficients", tiny, experts[1], *QUICK, "-o", tmp_path / "w.json")
    assert (done.code, f"{broken}: tensor 'conv_in.weight' holds NaN or Inf" in done.err) == (
        3,
        True,
    ), done.err


def test_experts_of_other_bases_and_shapes_are_refused(
    run: Run, tiny: Path, experts: list[Path], make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    record = experts[0] / "expert.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "base_sha256": "0" * 64}))
    done = run("coefficients", tiny, *experts, *QUICK, "-o", tmp_path / "w.json")
    assert (done.code, "was finetuned from a base of sha256" in done.err) == (3, True)
    other = make_tiny(block_out_channels=(4, 8))
    done = run("coefficients", tiny, other, *QUICK, "--ranges", "joint", "-o", tmp_path / "w.json")
    assert (done.code, "of another shape" in done.err) == (3, True)


def test_images_that_experts_were_trained_on_are_pointed_out(
    run: Run, tiny: Path, tmp_path: Path
) -> None:
    train = (
        "--max-train-steps",
        1,
        "--train-batch-size",
        2,
        "--ranges",
        "uniform:1",
        "--device",
        "cpu",
    )
    assert run("finetune", tiny, "--data", "digits", *train, "-o", tmp_path / "e").code == 0
    expert = tmp_path / "e" / "0000-1000"
    for split, told in (("train", True), ("test", False)):
        done = run(
            "coefficients", tiny, expert, *QUICK, "--split", split, "-o", tmp_path / f"{split}.json"
        )
        assert done.code == 0
        assert ("trained on these images" in done.err) is told
        record = json.loads((tmp_path / f"{split}.json").read_text())["record"]
        assert record["inputs"]["trained_on"] == ([str(expert)] if told else [])


def test_a_lora_is_an_expert(run: Run, tiny: Path, experts: list[Path], tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    assert run("merge", tiny, experts[0], "--weights", "1", "--lora-rank", 4, "-o", lora).code == 0
    done = run("coefficients", tiny, lora, *QUICK, "--ranges", "joint", "-o", tmp_path / "w.json")
    assert done.code == 0, done.err


def test_text_to_image_models(
    run: Run, tiny_text: Path, image_folder: Path, tmp_path: Path
) -> None:
    quick = (
        "--data",
        image_folder,
        "--split",
        "all",
        "--samples",
        5,
        "--groups",
        5,
        "--ranges",
        "joint",
        "--device",
        "cpu",
    )
    done = run("coefficients", tiny_text, tiny_text, *quick, "-o", tmp_path / "w.json")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "w.json").read_text())["weights"] == [
        0.0
    ]  # an expert that is the base changes nothing
