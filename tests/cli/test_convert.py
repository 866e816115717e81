"""`demerge convert`: it asks for what it needs, says what it wrote, and replaces nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from demerge.storage.single_file import to_file


def test_converts_on_request(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source, out = tmp_path / "model.bin", tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(2, 3)}, source)
    refused = run("convert", source, out)
    assert refused.code == 2 and "--allow-pickle" in refused.err and not out.exists()
    done = run("convert", source, out, "--allow-pickle", "--json")
    assert done.code == 0 and json.loads(done.out) == {
        "out": str(out),
        "tensors": 1,
        "parameters": 6,
    }
    assert run("convert", source, out, "--allow-pickle").code == 2


def test_errors_about_pickles_name_the_command(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "unet").mkdir()
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    for path in (tmp_path / "unet", tmp_path / "unet" / "diffusion_pytorch_model.bin"):
        done = run("inspect", path)
        assert done.code == 3 and "demerge convert" in done.err


def test_the_command_says_what_it_needs_and_replaces_nothing(
    run: Any, tiny_text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    to_file(tiny_text, file)
    refused = run("convert", file, tmp_path / "out")
    assert refused.code == 2 and "--config" in refused.err
    done = run("convert", file, tmp_path / "out", "--config", tiny_text, "--json")
    assert done.code == 0 and json.loads(done.out)["tensors"]["vae"] > 0
    assert run("convert", file, tmp_path / "out", "--config", tiny_text).code == 2
    assert run("convert", tmp_path / "out", tmp_path / "out.safetensors").code == 0
    assert (tmp_path / "out.safetensors").read_bytes() == file.read_bytes()
    assert run("convert", tmp_path / "out", tmp_path / "out.safetensors").code == 2


def test_merge_takes_a_single_file_as_an_expert_of_a_folder(
    run: Any, tiny_text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    to_file(tiny_text, file)
    refused = run("merge", tiny_text, file, "--weights", 1, "-o", tmp_path / "merged")
    assert refused.code == 3 and "the base has no VAE and no text encoder" in refused.err
    assert "--extra drop" in refused.err
    merged = tmp_path / "merged"
    done = run("merge", tiny_text, file, "--weights", 1, "--extra", "drop", "-o", merged)
    weights = "unet/diffusion_pytorch_model.safetensors"
    one, other = load_file(tiny_text / weights), load_file(merged / weights)
    assert done.code == 0 and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
