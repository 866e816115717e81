"""Experts in the layout of the original code onto bases in diffusers' layout, and crosswise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from demerge.errors import InputError
from demerge.merging import MergeSession, merge
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.lazy import Lazy
from demerge.storage.names import find_family
from demerge.storage.names.tensors import Renamed

Make = Callable[..., Any]
Tensors = dict[str, Tensor]
FAMILIES = ("SDXL", "SD3", "Flux", "Wan")
WEIGHTS = "diffusion_pytorch_model.safetensors"
PREFIX = "model.diffusion_model."


def in_original_layout(tensors: Tensors) -> Tensors:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    renamed = Renamed(tensors, shapes, find_family(tensors), to_original=True)
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


@pytest.fixture
def layouts(tiny_denoiser: Make, tmp_path: Path) -> Callable[[str], list[tuple[Path, ...]]]:
    """layouts("Flux") -> three models, each as diffusers' folder, as a bare and a prefixed file."""

    def save(family: str) -> list[tuple[Path, ...]]:
        models = []
        for i in range(3):
            folder = tmp_path / str(i)
            tiny_denoiser(family, seed=i).save_pretrained(folder)
            original = in_original_layout(load_file(folder / WEIGHTS))
            bare, prefixed = tmp_path / f"{i}.safetensors", tmp_path / f"{i}p.safetensors"
            save_file(original, bare)
            save_file({f"{PREFIX}{name}": tensor for name, tensor in original.items()}, prefixed)
            models.append((folder, bare, prefixed))
        return models

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_of_base_and_expert_gives_the_same_merge(
    family: str, layouts: Callable[[str], list[tuple[Path, ...]]], tmp_path: Path
) -> None:
    base, one, other = layouts(family)
    merge(base[0], [one[0], other[0]], tmp_path / "wanted", method="ties", options={"density": 0.5})
    wanted = load_file(tmp_path / "wanted" / WEIGHTS)
    merge(base[0], [one[1], other[2]], tmp_path / "out", method="ties", options={"density": 0.5})
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for i, prefix in ((1, ""), (2, PREFIX)):
        out = tmp_path / f"{i}out.safetensors"
        merge(base[i], [one[0], other[3 - i]], out, weights=[0.3, 0.6])
        merge(base[0], [one[0], other[0]], tmp_path / f"l{i}", weights=[0.3, 0.6])
        wanted = in_original_layout(load_file(tmp_path / f"l{i}" / WEIGHTS))
        found = load_file(out)
        assert found.keys() == {f"{prefix}{name}" for name in wanted}
        assert all(torch.equal(found[f"{prefix}{name}"], wanted[name]) for name in wanted)


def test_a_session_and_workers_read_an_expert_in_another_layout(
    layouts: Callable[[str], list[tuple[Path, ...]]], tmp_path: Path
) -> None:
    base, one, other = layouts("Flux")
    merge(base[1], [one[0], other[0]], tmp_path / "x1.safetensors", method="average", num_workers=2)
    merge(base[1], [one[1], other[1]], tmp_path / "x2.safetensors", method="average")
    found, wanted = (load_file(tmp_path / f"x{i}.safetensors") for i in (1, 2))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    session = MergeSession(base[1], [one[0], other[0]], method="task_arithmetic")
    start = MergeSession(base[1], [one[1], other[1]], method="task_arithmetic")
    merged, same = (each.theta([0.3, 0.6]) for each in (session, start))
    assert all(torch.equal(merged[name], same[name]) for name in wanted)


def test_scaled_fp8_is_split_and_joined_with_its_scales(
    layouts: Callable[[str], list[tuple[Path, ...]]], tmp_path: Path
) -> None:
    base, one, _ = layouts("Flux")
    module = "double_blocks.0.img_attn.qkv"
    for rows in (False, True):
        held = load_file(one[1])
        weight = held[f"{module}.weight"]
        scale = torch.rand(48) / 100 + 0.01 if rows else torch.tensor(0.01)
        held[f"{module}.weight"] = (weight / scale.view(-1, 1)).to(torch.float8_e4m3fn)
        held[f"{module}.scale_weight"] = scale
        save_file(held, tmp_path / "fp8.safetensors")
        values = held[f"{module}.weight"].float() * scale.view(-1, 1)
        expert = Checkpoint.open(tmp_path / "fp8.safetensors")
        split = expert.named_like(Checkpoint.open(base[0]))
        parts = [split[f"transformer_blocks.0.attn.to_{x}.weight"] for x in "qkv"]
        assert all(part.shape == (16, 16) and part.dtype == torch.float32 for part in parts)
        assert torch.equal(
            torch.cat([part.reshape(-1)[:] + 0 for part in parts]).view(48, 16), values
        )
    joined = Checkpoint.open(one[0]).named_like(Checkpoint.open(base[1]))[f"{module}.weight"]
    assert isinstance(joined, Lazy) and joined.shape == (48, 16) and len(joined) == 48
    whole = load_file(one[1])[f"{module}.weight"]
    assert torch.equal(joined + 0, whole)
    for start, stop in ((0, 10), (250, 520), (256, 512), (700, 9999), (5, 5)):
        assert torch.equal(joined.reshape(-1)[start:stop], whole.reshape(-1)[start:stop])


def test_a_model_that_lacks_a_part_of_a_fused_matrix_is_refused(
    layouts: Callable[[str], list[tuple[Path, ...]]], tmp_path: Path
) -> None:
    base, one, _ = layouts("Flux")
    held = load_file(one[0] / WEIGHTS)
    del held["transformer_blocks.0.attn.to_k.weight"]
    save_file(held, tmp_path / "less.safetensors")
    with pytest.raises(InputError, match=r"Flux model: .*qkv\.weight needs .*to_k\.weight"):
        merge(base[1], [tmp_path / "less.safetensors"], tmp_path / "out.safetensors")
