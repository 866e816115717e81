"""The recipes of examples/ work, by the very commands that its README shows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from demerge.cli.main import app

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
