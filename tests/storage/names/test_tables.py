"""The tables of names: a model in the original layout is what diffusers' converters read."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as stock
from torch import Tensor

from demerge.storage.names import find_family
from demerge.storage.names.tensors import Renamed
from demerge.storage.names.unet import UNet

Make = Callable[..., Any]
Tensors = dict[str, Tensor]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SDXL": ("convert_ldm_unet_checkpoint", {}),
    "SD 1.x": ("convert_ldm_unet_checkpoint", {"layers_per_block": 2}),
    "Flux": (
        "convert_flux_transformer_checkpoint_to_diffusers",
        {"num_layers": 2, "guidance_embeds": True},
    ),
    "SD3": (
        "convert_sd3_transformer_checkpoint_to_diffusers",
        {"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    ),
    "Wan": (
        "convert_wan_transformer_to_diffusers",
        {"num_layers": 2, "image_dim": 6, "added_kv_proj_dim": 24},
    ),
}


def converter(name: str, width: int) -> Callable[..., Tensors]:
    """A converter of diffusers; that of Flux for another width than the 3072 that it assumes."""
    source = textwrap.dedent(inspect.getsource(getattr(stock, name)))
    space: dict[str, Any] = dict(vars(stock))
    exec(source.replace("3072", str(width)), space)
    made: Callable[..., Tensors] = space[name]
    return made


def renamed(tensors: Tensors, to_original: bool) -> Tensors:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return dict(Renamed(tensors, shapes, find_family(tensors), to_original=to_original))


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parity
@pytest.mark.parametrize("name", MODELS)
def test_the_original_layout_is_what_diffusers_converts(name: str, tiny_denoiser: Make) -> None:
    function, changes = MODELS[name]
    model = tiny_denoiser(name, **changes)
    tensors = dict(model.state_dict())
    original = renamed(tensors, to_original=True)
    assert len(set(original) & set(tensors)) < 5 and find_family(original).name != "unknown"
    prefixed = {f"model.diffusion_model.{n}": t.clone() for n, t in original.items()}
    convert = converter(function, width=16)
    back = convert(prefixed, config=dict(model.config))
    assert same(back, tensors)
    assert same(renamed(original, to_original=False), tensors)


def test_a_family_is_known_by_flat_and_by_dotted_names() -> None:
    for names, family in (
        (["double_blocks_0_img_attn_qkv"], "Flux"),
        (["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"], "Flux"),
        (["joint_blocks_3_x_block_attn_qkv"], "SD3"),
        (["blocks_0_self_attn_q"], "Wan"),
        (["blocks.0.attn1.to_q.weight"], "Wan"),
        (["input_blocks_4_1_proj_in"], "UNet"),
        (["down_blocks.0.resnets.0.conv1"], "UNet"),
        (["transformer_blocks.0.attn.to_q"], "unknown"),
        ([], "unknown"),
    ):
        assert find_family(names).name == family, names


def test_kohya_has_the_original_names_of_all_but_small_unets() -> None:
    assert not UNet.of(["down_blocks.0.resnets.0.conv1"]).has_kohya_original
    assert UNet.of(["add_embedding.linear_1"]).has_kohya_original
    assert find_family(["double_blocks.0.img_attn.qkv"]).has_kohya_original


@pytest.mark.parametrize("name", MODELS)
def test_a_flat_name_gets_its_dots(name: str, tiny_denoiser: Make) -> None:
    tensors = dict(tiny_denoiser(name, **MODELS[name][1]).state_dict())
    for layout in (tensors, renamed(tensors, to_original=True)):
        family = find_family(layout)
        for tensor in (n for n, t in layout.items() if n.endswith(".weight") and t.ndim > 1):
            module = tensor.removesuffix(".weight")
            assert family.dotted(module.replace(".", "_")) == family.dotted(module) == module


def test_a_matrix_that_cannot_be_split_or_joined_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 rows cannot be those of .*to_q"):
        renamed({"double_blocks.0.img_attn.qkv.weight": torch.ones(4, 2)}, to_original=False)
    tensors = {"single_transformer_blocks.0.attn.to_q.weight": torch.ones(4, 4)}
    with pytest.raises(ValueError, match=r"needs .*to_k\.weight"):
        renamed(tensors, to_original=True)
