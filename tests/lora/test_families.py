"""LoRA files of SDXL, Flux, SD3 and Wan: every program's names, onto both layouts of the base.

The oracle is diffusers: `tests/storage/names/test_tables.py` holds the layouts against its converters of
single files, and here its converters of LoRA files give the same deltas.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as stock
from safetensors.torch import save_file
from torch import Tensor

from demerge.errors import InputError
from demerge.lora import Adapter, open_expert
from demerge.merging import merge
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.names import find_family, flat
from demerge.storage.names.tensors import Renamed

Tensors = dict[str, Tensor]
Make = Callable[..., Any]
R, ALPHA = 2, 3.0
FAMILIES = ("SDXL", "Flux", "SD3", "Wan")
LAYERS = {"Flux": {"num_layers": 2, "num_single_layers": 2}, "SD3": {"num_layers": 2}}
ORIGINAL = {
    "comfy": ("diffusion_model.{}", "lora_A", "lora_B"),
    "comfy, down and up": ("diffusion_model.{}", "lora_down", "lora_up"),
    "bare": ("{}", "lora_A.default", "lora_B.default"),
    "a part of the single file": ("model.diffusion_model.{}", "lora_down", "lora_up"),
    "kohya and musubi": ("lora_unet_{}", "lora_down", "lora_up"),
}
DIFFUSERS = {
    "diffusers and ai-toolkit": ("transformer.{}", "lora_A", "lora_B"),
    "diffusers' unet": ("unet.{}", "lora_A", "lora_B"),
    "peft": ("base_model.model.{}", "lora_A", "lora_B"),
    "diffusion-pipe": ("diffusion_model.{}", "lora_A", "lora_B"),
    "OneTrainer": ("lora_transformer_{}", "lora_down", "lora_up"),
    "kohya": ("lora_unet_{}", "lora_down", "lora_up"),
    "LyCORIS": ("lycoris_{}", "lora_down", "lora_up"),
}


def other_layout(tensors: Tensors, family_of: Tensors, *, to_original: bool) -> Tensors:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return dict(Renamed(tensors, shapes, find_family(family_of), to_original=to_original))


def write(path: Path, base: Tensors, form: tuple[str, str, str]) -> Tensors:
    """Write a LoRA on all layers of a base, in a program's names; return its deltas, with zeros."""
    g = torch.Generator().manual_seed(0)
    stem, down, up = form
    held: Tensors = {}
    deltas: Tensors = {}
    for name, weight in base.items():
        deltas[name] = torch.zeros_like(weight)
        if not name.endswith(".weight") or weight.ndim < 2 or 0 in weight.shape:
            continue
        A = torch.randn(R, *weight.shape[1:], generator=g)
        B = torch.randn(len(weight), R, *(1,) * (weight.ndim - 2), generator=g)
        module = name.removesuffix(".weight")
        module = stem.format(module if "." in stem or stem == "{}" else flat(module))
        held |= {
            f"{module}.{down}.weight": A,
            f"{module}.{up}.weight": B,
            f"{module}.alpha": torch.tensor(ALPHA),
        }
        product = B.double().flatten(1) @ A.double().flatten(1)
        deltas[name] = (product * (ALPHA / R)).float().view(weight.shape)
    save_file(held, path)
    return deltas


def assert_deltas(path: Path, base: Tensors, expected: Tensors) -> None:
    adapter = open_expert(path, base)
    assert isinstance(adapter, Adapter) and not adapter.notes
    assert set(adapter) == {name for name, delta in expected.items() if delta.any()}
    for name in adapter:
        assert torch.equal(adapter[name], expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_programs_names_onto_both_layouts(
    family: str, tiny_denoiser: Make, tmp_path: Path
) -> None:
    theirs = dict(tiny_denoiser(family, **LAYERS.get(family, {})).state_dict())
    original = other_layout(theirs, theirs, to_original=True)
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    path = tmp_path / "lora.safetensors"
    for form in ORIGINAL.values():
        deltas = write(path, original, form)
        assert_deltas(path, original, deltas)
        assert_deltas(path, prefixed, {f"model.diffusion_model.{n}": d for n, d in deltas.items()})
        assert_deltas(path, theirs, other_layout(deltas, theirs, to_original=False))
    for form in DIFFUSERS.values():
        deltas = write(path, theirs, form)
        assert_deltas(path, theirs, deltas)
        assert_deltas(path, original, other_layout(deltas, theirs, to_original=True))


# -- diffusers' converters -------------------------------------------------------------------------


def converter(name: str, width: int) -> Callable[..., Tensors]:
    """A converter of diffusers; that of Flux for another width than the 3072 that it assumes."""
    source = textwrap.dedent(inspect.getsource(getattr(stock, name)))
    source = source.replace("3072", str(width)).replace("12288", str(4 * width))
    space: dict[str, Any] = dict(vars(stock))
    exec(source, space)
    made: Callable[..., Tensors] = space[name]
    return made


def sdxl(tensors: Tensors) -> Tensors:
    """What diffusers makes of kohya's SDXL; alphas apart, in both of its spellings of factors."""
    config = SimpleNamespace(layers_per_block=1)
    tensors = stock._maybe_map_sgm_blocks_to_diffusers(tensors, config)
    made, alphas = stock._convert_non_diffusers_lora_to_diffusers(tensors)
    factors: Tensors = {}
    for key, tensor in made.items():
        plain = key.replace(".processor.", ".").replace("to_out_lora", "to_out.0_lora")
        plain = plain.replace("_lora.down", ".lora_A").replace("_lora.up", ".lora_B")
        plain = plain.replace(".lora.down", ".lora_A").replace(".lora.up", ".lora_B")
        factors[plain] = tensor * ALPHA / R if "lora_A" in plain else tensor
    assert set(alphas.values()) == {ALPHA}
    return factors


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "form", "name", "left_out"),
    [
        ("Flux", "kohya and musubi", "_convert_kohya_flux_lora_to_diffusers", ("final_layer",)),
        ("Flux", "comfy, down and up", "_convert_kohya_flux_lora_to_diffusers", ("final_layer",)),
        ("Wan", "comfy", "_convert_non_diffusers_wan_lora_to_diffusers", ("patch_",)),
        ("Wan", "kohya and musubi", "_convert_musubi_wan_lora_to_diffusers",
         ("patch_", "time_", "text_", "head")),
        ("SDXL", "kohya and musubi", "", ("upsamplers",)),
    ],
)  # fmt: skip
def test_the_deltas_are_those_of_diffusers_converters(
    family: str,
    form: str,
    name: str,
    left_out: tuple[str, ...],
    tiny_denoiser: Make,
    tmp_path: Path,
) -> None:
    """`left_out` are modules that the converter does not know, or whose alpha it drops."""
    theirs = dict(tiny_denoiser(family, **LAYERS.get(family, {})).state_dict())
    original = other_layout(theirs, theirs, to_original=True)
    kept = {n: t for n, t in original.items() if not n.startswith(left_out)}
    if family == "Wan" and form == "comfy":  # their alphas are dropped
        kept = {n: t for n, t in kept.items() if n.startswith("blocks")}
    path = tmp_path / "lora.safetensors"
    write(path, kept, ORIGINAL[form])
    adapter = open_expert(path, theirs)
    from safetensors.torch import load_file

    factors = converter(name, 16)(load_file(path)) if name else sdxl(load_file(path))
    stems = {key.split(".lora_")[0] for key in factors}
    assert len(stems) == len(adapter)
    for stem in stems:
        A, B = (factors[f"{stem}.lora_{side}.weight"].double().flatten(1) for side in "AB")
        weight = stem.split(".", 1)[1] if stem.startswith(("unet.", "transformer.")) else stem
        delta = adapter[f"{weight}.weight"]
        torch.testing.assert_close(delta.double(), (B @ A).view(delta.shape), rtol=1e-5, atol=1e-5)


# -- what else the files hold ----------------------------------------------------------------------


def test_differences_of_norms_and_biases_are_added_as_they_are(
    tiny_denoiser: Make, tmp_path: Path
) -> None:
    theirs = dict(tiny_denoiser("Wan").state_dict())
    names = {
        "diffusion_model.blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "diffusion_model.blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "diffusion_model.blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
        "diffusion_model.head.modulation.diff": "scale_shift_table",
    }
    g = torch.Generator().manual_seed(0)
    held = {key: torch.randn(theirs[name].shape, generator=g) for key, name in names.items()}
    save_file(held, tmp_path / "lora.safetensors")
    adapter = open_expert(tmp_path / "lora.safetensors", theirs)
    assert set(adapter) == set(names.values())
    assert all(torch.equal(adapter[name], held[key]) for key, name in names.items())


def test_a_bias_of_a_fused_matrix_is_split_like_its_rows(
    tiny_denoiser: Make, tmp_path: Path
) -> None:
    theirs = dict(tiny_denoiser("Flux").state_dict())
    whole = torch.randn(7 * 16)
    halves = torch.randn(2 * 16)
    held = {
        "diffusion_model.single_blocks.0.linear1.diff_b": whole,
        "diffusion_model.final_layer.adaLN_modulation.1.diff_b": halves,
    }
    save_file(held, tmp_path / "lora.safetensors")
    adapter = open_expert(tmp_path / "lora.safetensors", theirs)
    single = "single_transformer_blocks.0"
    parts = [f"{single}.attn.to_{x}.bias" for x in "qkv"] + [f"{single}.proj_mlp.bias"]
    assert torch.equal(torch.cat([adapter[part] for part in parts]), whole)
    assert torch.equal(adapter["norm_out.linear.bias"], torch.cat([halves[16:], halves[:16]]))


@pytest.mark.parametrize("kind", ["dora_scale", "lora_magnitude_vector"])
def test_a_dora_on_a_fused_matrix_is_that_of_its_rows(
    kind: str, tiny_denoiser: Make, tmp_path: Path
) -> None:
    theirs = dict(tiny_denoiser("Flux").state_dict())
    original = other_layout(theirs, theirs, to_original=True)
    module, g = "double_blocks.0.img_attn.qkv", torch.Generator().manual_seed(0)
    weight = original[f"{module}.weight"]
    held = {
        f"diffusion_model.{module}.lora_A.weight": torch.randn(R, 16, generator=g),
        f"diffusion_model.{module}.lora_B.weight": torch.randn(48, R, generator=g),
        f"diffusion_model.{module}.{kind}": torch.rand(48, 1, generator=g) + 0.5,
    }
    save_file(held, tmp_path / "lora.safetensors")
    whole = open_expert(tmp_path / "lora.safetensors", original)[f"{module}.weight"]
    norms = (weight + whole).norm(dim=1, keepdim=True)
    torch.testing.assert_close(norms, held[f"diffusion_model.{module}.{kind}"])
    split = open_expert(tmp_path / "lora.safetensors", theirs)
    parts = [split[f"transformer_blocks.0.attn.to_{x}.weight"] for x in "qkv"]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


def test_a_dora_over_columns_of_a_matrix_in_parts_is_refused(
    tiny_denoiser: Make, tmp_path: Path
) -> None:
    module = "diffusion_model.double_blocks.0.img_attn.qkv"
    held = {
        f"{module}.lora_A.weight": torch.ones(R, 16),
        f"{module}.lora_B.weight": torch.ones(48, R),
        f"{module}.dora_scale": torch.ones(1, 16),
    }
    save_file(held, tmp_path / "lora.safetensors")
    theirs = dict(tiny_denoiser("Flux").state_dict())
    with pytest.raises(InputError, match="a norm over all rows of a matrix that the base has in"):
        open_expert(tmp_path / "lora.safetensors", theirs)


def test_a_lora_on_a_part_of_a_fused_matrix_leaves_the_rest(
    tiny_denoiser: Make, tmp_path: Path
) -> None:
    theirs = dict(tiny_denoiser("Flux").state_dict())
    original = other_layout(theirs, theirs, to_original=True)
    module = "transformer.single_transformer_blocks.0.attn.to_k"
    A, B = torch.randn(R, 16), torch.randn(16, R)
    save_file(
        {
            f"{module}.lora_A.weight": A,
            f"{module}.lora_B.weight": B,
            f"{module}.alpha": torch.ones(1),
        },
        tmp_path / "lora.safetensors",
    )
    delta = open_expert(tmp_path / "lora.safetensors", original)["single_blocks.0.linear1.weight"]
    torch.testing.assert_close(delta[16:32], B @ A / R)
    assert not delta[:16].any() and not delta[32:].any()


def test_a_module_that_no_family_has_is_counted(tiny_denoiser: Make, tmp_path: Path) -> None:
    theirs = dict(tiny_denoiser("Flux").state_dict())
    held = {}
    for module in ("double_blocks_0_img_attn_qkv", "double_blocks_9_img_attn_qkv", "blocks_0_q"):
        held[f"lora_unet_{module}.lora_down.weight"] = torch.ones(R, 16)
        held[f"lora_unet_{module}.lora_up.weight"] = torch.ones(48, R)
    save_file(held, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"2 of 3 modules are not in the base .*double_blocks_9"):
        open_expert(tmp_path / "lora.safetensors", theirs)


def test_loras_in_the_names_of_two_programs_merge_without_a_base(
    tiny_denoiser: Make, tmp_path: Path
) -> None:
    theirs = dict(tiny_denoiser("Flux").state_dict())
    original = other_layout(theirs, theirs, to_original=True)
    one, other = tmp_path / "comfy.safetensors", tmp_path / "diffusers.safetensors"
    first = write(one, original, ORIGINAL["comfy"])
    second = other_layout(write(other, theirs, DIFFUSERS["peft"]), theirs, to_original=True)
    merge(one, [other], tmp_path / "out.safetensors", method="average")
    adapter = open_expert(tmp_path / "out.safetensors", theirs)
    expected = other_layout(
        {n: (first[n] + second[n]) / 2 for n in first}, theirs, to_original=False
    )
    assert set(adapter) == {name for name, delta in expected.items() if delta.any()}
    for name in adapter:
        torch.testing.assert_close(adapter[name], expected[name], rtol=1e-4, atol=1e-5)


def test_bases_whose_matrices_cannot_be_split_are_refused(tmp_path: Path) -> None:
    module = "transformer.transformer_blocks.0.attn.to_q"
    held = {
        f"{module}.lora_A.weight": torch.ones(R, 4),
        f"{module}.lora_B.weight": torch.ones(4, R),
    }
    save_file(held, tmp_path / "lora.safetensors")
    for shape in ((4, 4), (0, 4), ()):
        base = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(shape)}
        with pytest.raises(InputError, match="1 of 1 modules are not in the base"):
            open_expert(tmp_path / "lora.safetensors", base)
        save_file(base, tmp_path / "base.safetensors")
        names = {"transformer_blocks.0.attn.to_q.weight": 1, "single_transformer_blocks.0.x": 1}
        with pytest.raises(InputError, match="does not have the tensors of a Flux model"):
            Checkpoint.open(tmp_path / "base.safetensors").named_like(names)


def test_lora_files_named_after_their_noise_go_to_the_two_denoisers(
    tiny_denoiser: Make, tmp_path: Path
) -> None:
    import diffusers

    models = [tiny_denoiser("Wan", seed) for seed in (0, 1)]
    pipeline = diffusers.WanPipeline(
        text_encoder=None, tokenizer=None, vae=None, transformer=models[0], transformer_2=models[1],
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), boundary_ratio=0.875,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "base")
    deltas, paths = [], []
    for model, side in zip(models, ("high", "low"), strict=True):
        theirs = dict(model.state_dict())
        original = other_layout(theirs, theirs, to_original=True)
        paths.append(tmp_path / f"style_{side}_noise.safetensors")
        made = write(paths[-1], original, ORIGINAL["kohya and musubi"])
        deltas.append(other_layout(made, theirs, to_original=False))
    merge(tmp_path / "base", paths, tmp_path / "out", weights=[1, 0.5])
    merged = diffusers.WanPipeline.from_pretrained(
        tmp_path / "out", text_encoder=None, tokenizer=None, vae=None
    )
    for part, model, delta, weight in zip(
        (merged.transformer, merged.transformer_2), models, deltas, (1, 0.5), strict=True
    ):
        state = part.state_dict()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name], tensor + weight * delta[name])
