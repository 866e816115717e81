"""A merge as a LoRA: the nearest deltas of a rank, read back as written; losses are counted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from demerge.errors import NumericalError, UsageError
from demerge.lora import Adapter, open_expert
from demerge.merging.output.lora import (
    AdapterSummary,
    Naming,
    factorize,
    name_prefix,
    write_adapter,
)
from demerge.storage.layout import CheckpointLocation

SHAPES = {
    "down_blocks.0.conv.weight": (5, 3, 3, 3),
    "mid_block.attentions.0.to_q.weight": (6, 9),
    "mid_block.attentions.0.to_out.0.weight": (9, 6),
    "up_blocks.0.small.weight": (2, 8),
}


UNET = Naming("unet.{}")


@pytest.fixture
def deltas() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def nearest(delta: Tensor, rank: int) -> Tensor:
    U, S, V = torch.linalg.svd(delta.double().flatten(1), full_matrices=False)
    return (U[:, :rank] * S[:rank] @ V[:rank]).view(delta.shape)


def read(summary: AdapterSummary, base: dict[str, Tensor]) -> Adapter:
    adapter = open_expert(summary.path, base)
    assert isinstance(adapter, Adapter)
    return adapter


@pytest.mark.parametrize("rank", [1, 3, 12])
@pytest.mark.parametrize("prefix", ["unet", "transformer"])
def test_reads_back_as_the_nearest_of_the_rank(
    deltas: dict[str, Tensor], rank: int, prefix: str, tmp_path: Path
) -> None:
    naming = Naming(f"{prefix}.{{}}")
    summary = write_adapter(
        tmp_path / "a.safetensors", deltas.items(), rank, naming, {"made": "here"}
    )
    adapter = read(summary, {n: torch.zeros_like(t) for n, t in deltas.items()})
    assert set(adapter) == set(deltas) and set(adapter.ranks.values()) == {rank}
    left = 0.0
    for name, delta in deltas.items():
        expected = nearest(delta, rank)
        torch.testing.assert_close(adapter[name].double(), expected, rtol=1e-5, atol=1e-5)
        share = 1 - float((delta - expected).square().sum() / delta.square().sum())
        assert summary.tensors[name].share == pytest.approx(share, abs=1e-6)
        left += float((delta - expected).square().sum())
    whole = float(sum(d.square().sum() for d in deltas.values()))
    assert summary.share == pytest.approx(1 - left / whole, abs=1e-6)
    assert all(
        name.startswith(f"{prefix}.") and ".lora_" in name for name in load_file(summary.path)
    )


def test_counts_the_energy_that_has_no_place_in_a_lora(
    deltas: dict[str, Tensor], tmp_path: Path
) -> None:
    others = {
        "conv_norm_out.weight": torch.ones(4),
        "conv_out.bias": torch.zeros(4),
        "scale_shift_table": torch.ones(2, 8),
        "class_embedding.weight": torch.ones(3, 3),
    }
    summary = write_adapter(tmp_path / "a.safetensors", {**others, **deltas}.items(), 12, UNET)
    assert summary.lost == {
        "conv_norm_out.weight": 4,
        "scale_shift_table": 16,
        "class_embedding.weight": 9,
    }
    held = float(sum(d.square().sum() for d in deltas.values()))
    assert summary.share == pytest.approx(held / (held + 29), abs=1e-6)
    assert summary.document()["lost"]["scale_shift_table"] == 16


def test_old_names_of_attention_are_written_as_diffusers_loads_them(tmp_path: Path) -> None:
    summary = write_adapter(
        tmp_path / "a.safetensors", [("mid.attentions.0.proj_attn.weight", torch.eye(2))], 1, UNET
    )
    assert set(load_file(summary.path)) == {
        f"unet.mid.attentions.0.to_out.0.lora_{x}.weight" for x in "AB"
    }


def test_refuses_deltas_that_make_no_lora(tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    with pytest.raises(UsageError, match="no linear layer"):
        write_adapter(out, [("x.weight", torch.zeros(2, 2)), ("x.bias", torch.ones(2))], 1, UNET)
    with pytest.raises(NumericalError, match=r"x\.weight"):
        write_adapter(out, [("x.weight", torch.full((2, 2), math.nan))], 1, UNET)
    assert not out.exists()


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4), (1, 5), (5, 1)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_factors_are_those_of_the_svd_at_any_scale(shape: tuple[int, int], scale: float) -> None:
    M = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    for rank in (1, 2, 9):
        A, B, held = factorize(M, rank)
        expected = nearest(M, rank)
        assert A.shape == (rank, shape[1]) and B.shape == (shape[0], rank)
        torch.testing.assert_close(B @ A / scale, expected / scale, rtol=1e-6, atol=1e-7)
        assert held == pytest.approx(float(expected.square().sum()), rel=1e-6)


def test_a_delta_of_rank_one_is_whole_at_rank_one() -> None:
    M = torch.outer(torch.tensor([3.0, 0, 4]), torch.tensor([1.0, 2]))
    A, B, held = factorize(M, 1)
    torch.testing.assert_close(B @ A, M.double())
    assert held == pytest.approx(125)
    A, B, held = factorize(torch.zeros(2, 3), 2)
    assert held == 0 and not (B @ A).any()


def test_the_prefix_is_the_folders_or_told_by_the_tensors() -> None:
    def place(folder: str | None) -> CheckpointLocation:
        return CheckpointLocation(Path("x"), None, Path(folder) if folder else None, ())

    assert name_prefix(place("a/unet"), []) == "unet"
    assert name_prefix(place("a/transformer_2"), []) == "transformer"
    assert name_prefix(place("a/b"), ["conv_in.weight", "down_blocks.0.conv.weight"]) == "unet"
    assert name_prefix(place(None), ["blocks.0.attn.weight"]) == "transformer"


@pytest.mark.parity
def test_diffusers_loads_it(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    import diffusers

    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=6,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    base = {n: t.clone() for n, t in model.state_dict().items()}
    deltas = {n: 0.1 * torch.randn_like(t) for n, t in base.items() if t.ndim > 1}
    summary = write_adapter(tmp_path / "pytorch_lora_weights.safetensors", deltas.items(), 5, UNET)
    adapter = read(summary, base)
    model.load_lora_adapter(tmp_path, prefix="unet", weight_name=summary.path.name)
    model.fuse_lora()
    fused = {
        n.replace(".base_layer", ""): t for n, t in model.state_dict().items() if "lora_" not in n
    }
    for name, tensor in base.items():
        torch.testing.assert_close(
            fused[name], tensor + adapter.get(name, torch.zeros(())), rtol=1e-4, atol=1e-4
        )
