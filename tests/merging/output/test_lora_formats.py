"""A merge as LoRA files in the names of diffusers, ComfyUI and kohya, read back by stock diffusers."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import lora_conversion_utils, lora_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from demerge.errors import UsageError
from demerge.lora import open_expert
from demerge.merging import Recipe, merge, verify
from demerge.storage.names import find_family
from demerge.storage.names.tensors import Renamed

Make = Callable[..., Any]
Tensors = dict[str, Tensor]
PIPELINES = {
    "SDXL": (diffusers.StableDiffusionXLPipeline, "unet"),
    "SD3": (diffusers.StableDiffusion3Pipeline, "transformer"),
    "Flux": (diffusers.FluxPipeline, "transformer"),
    "Wan": (diffusers.WanPipeline, "transformer"),
}
RANK = 64  # of every tiny matrix
KOHYA_FLUX = "_convert_kohya_flux_lora_to_diffusers"


def save(model: Any, folder: Path, seed: int) -> Tensors:
    """Save a copy of a model whose layers have moved; return its deltas."""
    g = torch.Generator().manual_seed(seed)
    deltas = {
        name: 0.1 * torch.randn(tensor.shape, generator=g)
        for name, tensor in model.state_dict().items()
        if name.endswith(".weight") and tensor.ndim > 1 and name != "pos_embed.proj.weight"
    }
    other = type(model).from_config(model.config)
    moved = {n: t + deltas[n] if n in deltas else t for n, t in model.state_dict().items()}
    other.load_state_dict(moved)
    other.save_pretrained(folder)
    return deltas


def fuse(kind: Any, part: str, model: Any, path: Path, **options: Any) -> Tensors:
    """The weights that stock diffusers makes of a model and a LoRA."""
    pipeline = kind(**{
        name: None
        for name in inspect.signature(kind.__init__).parameters
        if name in ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2",
                    "tokenizer_3", "vae")
    } | {"scheduler": None, part: model})  # fmt: skip
    pipeline.load_lora_weights(path.parent, weight_name=path.name, **options)
    part = "transformer_2" if options else part
    pipeline.fuse_lora(components=[part])
    state = getattr(pipeline, part).state_dict()
    return {n.replace(".base_layer", ""): t for n, t in state.items() if "lora_" not in n}


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers' converter for Flux take 16 channels for the 3072 that it assumes."""
    function = getattr(lora_conversion_utils, KOHYA_FLUX)
    source = textwrap.dedent(inspect.getsource(function)).replace("3072", "16")
    space: dict[str, Any] = dict(vars(lora_conversion_utils))
    exec(source.replace("12288", "64"), space)
    monkeypatch.setattr(lora_pipeline, KOHYA_FLUX, space[KOHYA_FLUX])


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "lora_format"),
    [
        ("SDXL", "diffusers"), ("SD3", "diffusers"), ("Flux", "diffusers"), ("Wan", "diffusers"),
        ("Flux", "comfy"), ("Wan", "comfy"), ("SDXL", "kohya"), ("Flux", "kohya"), ("Wan", "kohya"),
    ],
)  # fmt: skip
def test_stock_diffusers_loads_what_is_written(
    family: str,
    lora_format: str,
    tiny_denoiser: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow(monkeypatch)
    kind, part = PIPELINES[family]
    model = tiny_denoiser(family)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "base")
    deltas = save(model, tmp_path / "expert", 1)
    # what diffusers' converters of the other formats leave out
    only = ["blocks"] if (family, lora_format) in (("Wan", "comfy"), ("Wan", "kohya")) else []
    if (family, lora_format) == ("Flux", "kohya") or (family, lora_format) == ("Flux", "comfy"):
        only = ["blocks", "single"]
    merge(
        tmp_path / "base", [tmp_path / "expert"], tmp_path / "lora.safetensors", weights=[0.5],
        lora_rank=RANK, lora_format=lora_format, only=only,
    )  # fmt: skip
    fused = fuse(kind, part, model, tmp_path / "lora.safetensors")
    changed = {n for n in base if not torch.equal(base[n], fused[n])}
    wanted = {n for n in deltas if not only or n.startswith(("blocks", "single", "transformer_b"))}
    assert changed == wanted
    for name in changed:
        torch.testing.assert_close(fused[name], base[name] + deltas[name] / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*PIPELINES, "SD 1.x"])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_every_format_holds_the_same_deltas(
    family: str, layout: str, tiny_denoiser: Make, tmp_path: Path
) -> None:
    model = tiny_denoiser(family)
    model.save_pretrained(tmp_path / "0")
    deltas = save(model, tmp_path / "1", 1)
    paths = [tmp_path / "0", tmp_path / "1"]
    if layout == "original":
        for i in range(2):
            tensors = load_file(paths[i] / "diffusion_pytorch_model.safetensors")
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            original = Renamed(tensors, shapes, find_family(tensors), to_original=True)
            named = {f"model.diffusion_model.{n}": t.contiguous() for n, t in original.items()}
            paths[i] = tmp_path / f"{i}.safetensors"
            save_file(named | {"first_stage_model.encoder.weight": torch.full((2, 2), float(i))},
                      paths[i])  # fmt: skip
    for form in ("auto", "diffusers", "comfy", "kohya"):
        out = tmp_path / f"{form}.safetensors"
        result = merge(paths[0], paths[1:], out, weights=[1], lora_rank=RANK, lora_format=form)
        adapter = open_expert(out, dict(model.state_dict()))
        assert set(adapter) == set(deltas) and not adapter.notes
        for name in adapter:
            torch.testing.assert_close(adapter[name], deltas[name], rtol=1e-4, atol=1e-5)
        lost = {"first_stage_model.encoder.weight": 4.0} if layout == "original" else {}
        assert result.adapter is not None and result.adapter.lost == lost
        stems = {"diffusers": ("unet.", "transformer."), "comfy": ("diffusion_model.",)}
        wanted = "comfy" if (form, layout) == ("auto", "original") else form
        assert all(key.startswith(stems.get(wanted, ("lora_unet_", "unet.", "transformer.")))
                   for key in load_file(out))  # fmt: skip


def test_a_part_of_a_fused_matrix_is_written_with_zeros_for_the_rest(
    tiny_denoiser: Make, tmp_path: Path
) -> None:
    model = tiny_denoiser("Flux")
    model.save_pretrained(tmp_path / "base")
    deltas = save(model, tmp_path / "expert", 1)
    out, only = tmp_path / "lora.safetensors", ["**.to_k.weight"]
    merge(tmp_path / "base", [tmp_path / "expert"], out, weights=[1], lora_rank=RANK,
          lora_format="kohya", only=only)  # fmt: skip
    up = load_file(out)["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    assert up.shape == (48, RANK) and not up[:16].any() and not up[32:].any() and up[16:32].any()
    adapter = open_expert(out, dict(model.state_dict()))
    for name, delta in deltas.items():
        if name.endswith(".to_k.weight"):
            torch.testing.assert_close(adapter[name], delta, rtol=1e-4, atol=1e-5)


def test_lora_files_without_a_base_take_another_programs_names(
    tiny_denoiser: Make, tmp_path: Path
) -> None:
    model = tiny_denoiser("SDXL")
    model.save_pretrained(tmp_path / "base")
    deltas = save(model, tmp_path / "expert", 1)
    merge(tmp_path / "base", [tmp_path / "expert"], tmp_path / "kohya.safetensors", weights=[1],
          lora_rank=4, lora_format="kohya")  # fmt: skip
    for form, prefix in (("diffusers", "unet."), ("comfy", "diffusion_model."), ("auto", "lora_")):
        out = tmp_path / f"{form}.safetensors"
        merge(tmp_path / "kohya.safetensors", [], out, lora_rank=4, lora_format=form)
        assert all(key.startswith(prefix) for key in load_file(out))
        one, other = (open_expert(path, dict(model.state_dict()))
                      for path in (tmp_path / "kohya.safetensors", out))  # fmt: skip
        assert set(one) == set(other) == set(deltas)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_a_model_that_comfy_has_no_names_for_is_refused(
    tiny_denoiser: Make, tmp_path: Path
) -> None:
    model = tiny_denoiser("DiT")
    model.save_pretrained(tmp_path / "base")
    save(model, tmp_path / "expert", 1)
    with pytest.raises(UsageError, match="ComfyUI are not known"):
        merge(tmp_path / "base", [tmp_path / "expert"], tmp_path / "x.safetensors", weights=[1],
              lora_rank=2, lora_format="comfy")  # fmt: skip


@pytest.mark.parity
def test_two_denoisers_are_two_files(tiny_denoiser: Make, tmp_path: Path) -> None:
    models = [tiny_denoiser("Wan", seed) for seed in (0, 1)]
    none = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    deltas: list[Tensors] = []
    for name in ("base", "expert"):
        parts = models
        if name == "expert":
            deltas = [save(model, tmp_path / f"moved-{i}", i) for i, model in enumerate(models)]
            parts = [type(m).from_pretrained(tmp_path / f"moved-{i}") for i, m in enumerate(models)]
        pipeline = diffusers.WanPipeline(
            **none, scheduler=scheduler, transformer=parts[0], transformer_2=parts[1],
            boundary_ratio=0.875,
        )  # fmt: skip
        pipeline.save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    result = merge(tmp_path / "base", [tmp_path / "expert"], out, weights=[1], lora_rank=RANK)
    files = [out / f"pytorch_lora_weights_{side}_noise.safetensors" for side in ("high", "low")]
    assert [a.path.name for a in result.adapters] == [file.name for file in files]
    assert len(result.lines()) == 3 and len(result.document()["adapters"]) == 2
    for file, span in zip(files, ("875,1000", "0,875"), strict=True):
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["modelspec.timestep_range"] == span
    assert set(verify(out, Recipe.read(out)).files) == {file.name for file in files}
    for i, (file, options) in enumerate(
        zip(files, ({}, {"load_into_transformer_2": True}), strict=True)
    ):
        before = {n: t.clone() for n, t in models[i].state_dict().items()}
        pipeline = diffusers.WanPipeline.from_pretrained(tmp_path / "base", **none)
        pipeline.load_lora_weights(out, weight_name=file.name, **options)
        part = ("transformer", "transformer_2")[i]
        pipeline.fuse_lora(components=[part])
        state = getattr(pipeline, part).state_dict()
        for name, delta in deltas[i].items():
            fused = state[name.replace(".weight", ".base_layer.weight")]
            torch.testing.assert_close(fused, before[name] + delta, rtol=1e-4, atol=1e-5)


def test_an_expert_of_one_side_gives_one_file(tiny_denoiser: Make, tmp_path: Path) -> None:
    models = [tiny_denoiser("Wan", seed) for seed in (0, 1)]
    pipeline = diffusers.WanPipeline(
        text_encoder=None, tokenizer=None, vae=None, transformer=models[0], transformer_2=models[1],
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), boundary_ratio=0.875,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "base")
    save(models[1], tmp_path / "expert", 3)
    (tmp_path / "expert" / "expert.json").write_text(json.dumps({"range": [0, 875]}))
    merge(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", weights=[1], lora_rank=2)
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert names == {"pytorch_lora_weights_low_noise.safetensors"}
    merge(tmp_path / "base", [tmp_path / "expert"], tmp_path / "one.safetensors", weights=[1],
          lora_rank=2)  # fmt: skip
    assert (tmp_path / "one.safetensors").is_file()
