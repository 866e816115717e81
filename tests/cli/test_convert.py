"""`demerge convert`: it asks for --allow-pickle, and says what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def test_converts_on_request(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source, out = tmp_path / "model.bin", tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(2, 3)}, source)
    refused = run("convert", source, out)
    assert refused.code == 2 and "--allow-pickle" in refused.err and not out.exists()
    done = run("convert", source, out, "--allow-pickle", "--json")
    assert done.code == 0 and json.loads(done.out) == {"out": str(out), "tensors": 1, "parameters": 6}
    assert run("convert", source, out, "--allow-pickle").code == 2


def test_errors_about_pickles_name_the_command(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "unet").mkdir()
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    for path in (tmp_path / "unet", tmp_path / "unet" / "diffusion_pytorch_model.bin"):
        done = run("inspect", path)
        assert done.code == 3 and "demerge convert" in done.err
