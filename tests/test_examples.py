"""The recipes of examples/ work, by the very commands that its README shows."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from demerge.cli.main import app
from demerge.data import load_images
from demerge.diffusion.model import Diffusion

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = ["--max-train-steps", "1", "--train-batch-size", "2"]


def commands() -> list[str]:
    (block,) = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    return block.strip().splitlines()


def change_weights(file: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file)


def save_video(folder: Path, seed: int) -> None:
    """Save a pipeline of one denoiser, of a class that may have two."""
    (folder / "transformer").mkdir(parents=True)
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    save_file({"blocks.0.attn1.to_q.weight": weight}, folder / "transformer" / WEIGHTS)
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "scheduler").mkdir()
    config = {"num_train_timesteps": 1000}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    parts = {"transformer": ["diffusers", "X"], "transformer_2": [None, None]}
    index = {"_class_name": "WanPipeline", "boundary_ratio": None, **parts}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture
def workplace(tmp_path: Path, make_tiny: Callable[..., Path]) -> Path:
    """A folder with examples/ and, in it, the models that the recipes name."""
    folder = tmp_path / "workplace"
    examples = Path(shutil.copytree(EXAMPLES, folder / "examples"))
    base = Path(shutil.copytree(make_tiny(), examples / "base"))
    for number in (0, 1):
        expert = Path(shutil.copytree(base, examples / f"expert-{number}"))
        change_weights(expert / "unet" / WEIGHTS, number)
    for seed, name in enumerate(("video-base", "video-high", "video-low")):
        save_video(examples / name, seed)
    return folder


def test_every_example_is_run_and_listed() -> None:
    run = " ".join(commands())
    files = {path.name for path in EXAMPLES.glob("*.yaml")}
    assert {name for name in files if f"examples/{name}" not in run} == set()
    assert set(re.findall(r"\]\(([\w-]+\.yaml)\)", README)) == files


def test_the_commands_of_the_readme_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for command in commands():
        words = shlex.split(command)[1:]
        code = app([*words, *(SMALL if words[0] == "finetune" else [])], standalone_mode=False)
        assert not code, command
    made = {path.name for path in (workplace / "merged").iterdir()}
    names = {"ties", "dare", "rules", "two-denoisers", "mergekit", "lora.safetensors"}
    assert names <= made
    index = json.loads((workplace / "merged/two-denoisers/model_index.json").read_text())
    assert index["boundary_ratio"] == 0.875
    assert {path.name for path in (workplace / "experts").glob("0*")} == {"0000-0500", "0500-1000"}
    base, only = (
        load_file(workplace / folder / "unet" / WEIGHTS)
        for folder in ("examples/base", "merged/rules")
    )
    assert torch.equal(base["conv_in.weight"], only["conv_in.weight"])
    assert not torch.equal(
        base["mid_block.resnets.0.conv1.weight"], only["mid_block.resnets.0.conv1.weight"]
    )


# -- the recipe of examples/cifar10 ----------------------------------------------------------------


def save_images(file: Path, side: int, channels: int) -> Path:
    """Save 40 random images as an npz."""
    shape = (40, side, side, channels) if channels > 1 else (40, side, side)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(file, images=images)
    return file


def run_recipe(folder: Path, *words: str | Path) -> dict[str, float]:
    """Run the recipe at its smallest size; return the distance of each model."""
    script = EXAMPLES / "cifar10" / "run.py"
    command = [sys.executable, script, "--smoke", "--device", "cpu", "--out", folder / "run"]
    ended = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "report/index.html" in ended.stdout
    scores = [json.loads(path.read_text()) for path in (folder / "run/scores").glob("*.json")]
    return {score["model"]: score["metrics"]["fd"] for score in scores}


@pytest.mark.slow
def test_the_recipe_runs_and_goes_on_where_it_stopped(
    tmp_path: Path, make_tiny: Callable[..., Path]
) -> None:
    base, data = make_tiny(), save_images(tmp_path / "images.npz", 8, 1)
    files = ("--base", base, "--data", data)
    scores = run_recipe(tmp_path, *files)
    names = {"base", "joint", "ensemble", "average", "task-arithmetic", "ties", "dare", "fisher"}
    assert names < scores.keys() and len(scores) == len(names) + 1  # and the noise floor
    record = json.loads((tmp_path / "run/recipe.json").read_text())
    steps = [
        json.loads(path.read_text())["steps"] for path in tmp_path.glob("run/*/0*/expert.json")
    ]
    assert sorted(steps) == [2, 2, 2, 2, 8]  # four experts, and the control with all their steps
    # as after a stop in the middle: the last merge, and all that comes after it, are missing
    finished = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("run/*/0*/expert.json"))]
    for name in ("merged/fisher", "scores", "report"):
        shutil.rmtree(tmp_path / "run" / name)
    assert run_recipe(tmp_path, *files) == scores
    after = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("run/*/0*/expert.json"))]
    assert after == finished
    assert json.loads((tmp_path / "run/recipe.json").read_text()) == record


@pytest.mark.parametrize(
    ("minutes", "images", "seeds"), [(5, 750, 1), (60, 9_000, 1), (600, 10_000, 3)]
)
def test_the_size_of_the_recipe_fits_its_minutes(
    minutes: float, images: int, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = runpy.run_path(str(EXAMPLES / "cifar10" / "run.py"))
    step, image = 0.05, 0.002  # seconds, of a step and of an image in 5 sampling steps
    taken = {"finetune": step, "sample": image}
    choose_size, names = recipe["choose_size"], recipe["choose_size"].__globals__
    monkeypatch.setitem(names, "seconds_each", lambda command, *_: taken[command[0]])
    monkeypatch.setitem(names, "shutil", SimpleNamespace(rmtree=lambda *_, **__: None))
    words = ["--base", "b", "--data", "d", "--device", "cuda", "--minutes", str(minutes)]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    monkeypatch.setitem(names, "resolve_device", str)
    size = choose_size(recipe["parse"]())
    training = size.steps * 8 * step
    assert 0.39 < training / (60 * minutes) < 0.41
    assert size.images == pytest.approx(images, rel=0.02) and size.seeds == seeds
    assert size.groups == f"--budget {6 * minutes:.0f}s"


def test_the_recipe_refuses_to_go_on_with_other_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"options": {}, "commands": []}))
    script = str(EXAMPLES / "cifar10" / "run.py")
    words = ["--base", "a", "--data", "b", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit, match=r"begun with other options(.|\n)*fix:"):  # code 1
        runpy.run_path(script, run_name="__main__")


@pytest.mark.slow
@pytest.mark.parity
def test_the_recipe_runs_on_a_real_base(tmp_path: Path) -> None:
    """With statistics of real images: the distance is an FID."""
    assets = Path(os.environ.get("DEMERGE_ASSETS") or EXAMPLES.parents[1] / "shared/assets")
    base, data = assets / "cifar10-base", save_images(tmp_path / "images.npz", 32, 3)
    weights = assets / "inception/pt_inception-2015-12-05.nofc.safetensors"
    if not (base.exists() and weights.exists()):
        pytest.skip(f"neither base nor Inception is in {assets}")
    reference = base / "cifar10-train-inception.safetensors"
    files = ("--base", base, "--data", data, "--inception", weights, "--reference", reference)
    assert "ties" in run_recipe(tmp_path, *files)
    score = json.loads((tmp_path / "run/scores/base.seed0.json").read_text())
    assert score["protocol"]["distance"] == "FID" and score["protocol"]["reference_n"] == 50_000


# -- the recipe of examples/emoji ------------------------------------------------------------------


@pytest.fixture
def emoji(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module examples/emoji/toy.py."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "emoji"))
    return importlib.import_module("toy")


def test_prepare_makes_captioned_images_and_a_pipeline(emoji: Any, tmp_path: Path) -> None:
    emoji.write_assets(tmp_path)
    folders = {"--emoji": "emoji", "--text": "minilm", "--autoencoder": "taef2", "--out": "run"}
    words = [str(word) for name, value in folders.items() for word in (name, tmp_path / value)]
    emoji.prepare([*words, "--side", "16", "--widths", "8", "16"])
    data = load_images(tmp_path / "run/data", split="train")
    assert data.shape == (3, 16, 16) and "red disc" in load_images(tmp_path / "run/data").captions
    assert data.images([0])[0, :, 0, 0].tolist() == [255, 255, 255]
    model = Diffusion.load(tmp_path / "run/random")
    x0 = model.family.encode(data.images(range(len(data))) / 127.5 - 1)
    deviation, mean = torch.std_mean(x0, dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(deviation, torch.ones(4), atol=1e-4, rtol=0)
    one, two = (model.text([text])["encoder_hidden_states"] for text in ("red disc", "blue ring"))
    assert one.shape == (1, 16, 16) and not torch.equal(one, two)


@pytest.mark.slow
def test_the_commands_of_the_emoji_recipe_run(emoji: Any, tmp_path: Path) -> None:
    out = emoji.run(tmp_path)
    models = {json.loads(path.read_text())["model"] for path in (out / "scores").glob("*.json")}
    merged = {"average", "sum", "lora-average"}
    assert {"base", "joint", "ensemble", "lora-joint", "lora-ensemble", *merged} < models
    steps = [json.loads(path.read_text())["steps"] for path in out.glob("*/0*/expert.json")]
    assert sorted(steps) == [1, 1, 1, 1, 1, 2, 2]
    assert (out / "report/index.html").is_file()
    stock = diffusers.DiffusionPipeline.from_pretrained(out / "merged/lora-average")
    assert type(stock.vae).__name__ == "AutoencoderTAEF2"
