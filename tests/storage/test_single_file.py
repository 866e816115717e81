"""Single files in the LDM layout and pipeline folders: there and back to the bit, and as stock diffusers reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from demerge.errors import InputError
from demerge.storage.single_file import to_file, to_folder

FILES = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
UNET, VAE, TEXT = (Path(f"{name}.safetensors") for name in FILES)


@pytest.fixture(scope="module")
def deep(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of three blocks of two layers, so that all names of the layout occur, in half precision."""
    import diffusers

    folder = tmp_path_factory.mktemp("deep") / "base"
    shutil.copytree(tiny_text, folder)
    torch.manual_seed(1)
    config = dict(diffusers.UNet2DConditionModel.load_config(folder / "unet"))
    config |= {
        "layers_per_block": 2,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    diffusers.UNet2DConditionModel.from_config(config).half().save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def file(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a single file."""
    out = tmp_path_factory.mktemp("file") / "model.safetensors"
    to_file(deep, out)
    return out


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


def test_there_and_back_is_the_same_to_the_bit(deep: Path, file: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    counts = to_folder(file, tmp_path / "out", deep)
    assert all(same(deep / name, tmp_path / "out" / name) for name in (UNET, VAE, TEXT))
    assert sum(counts.values()) == len(load_file(file))
    to_file(tmp_path / "out", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    StableDiffusionPipeline.from_pretrained(tmp_path / "out")


def test_the_names_are_those_of_the_original_code(file: Path) -> None:
    held = load_file(file)
    unet, vae, text = (
        "model.diffusion_model.",
        "first_stage_model.",
        "cond_stage_model.transformer.text_model.",
    )
    for name in (
        "input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight", "input_blocks.3.0.op.weight",
        "input_blocks.4.0.skip_connection.weight", "middle_block.1.proj_in.weight", "middle_block.2.out_layers.3.weight",
        "output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "output_blocks.8.1.norm.weight", "out.2.weight",
    ):  # fmt: skip
        assert unet + name in held, name
    assert held[f"{vae}encoder.mid.attn_1.q.weight"].ndim == 4
    for name in (
        "decoder.up.1.upsample.conv.weight", "encoder.down.0.downsample.conv.weight", "encoder.norm_out.weight",
        "decoder.mid.attn_1.proj_out.weight", "decoder.mid.block_2.conv1.weight", "quant_conv.weight",
    ):  # fmt: skip
        assert vae + name in held, name
    assert f"{text}embeddings.position_embedding.weight" in held


def test_stock_diffusers_reads_the_file_as_it_reads_the_folder(deep: Path, file: Path) -> None:
    from diffusers import StableDiffusionPipeline

    one = StableDiffusionPipeline.from_single_file(
        str(file), config=str(deep), local_files_only=True
    )
    other = StableDiffusionPipeline.from_pretrained(deep)
    for part in ("unet", "vae", "text_encoder"):
        a, b = getattr(one, part).state_dict(), getattr(other, part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[n].float(), b[n].float()) for n in a), (
            part
        )


def test_what_the_file_lacks_is_the_configs_and_what_it_has_too_much_is_left_out(
    deep: Path, file: Path, tmp_path: Path
) -> None:
    held = load_file(file)
    unet = {
        n.removeprefix("model.diffusion_model."): t
        for n, t in held.items()
        if n.startswith("model.")
    }
    ema = {"model_ema.decay": torch.ones(1), "betas": torch.ones(3)}
    save_file(
        {f"_orig_mod.model.diffusion_model.{n}": t for n, t in unet.items()} | ema,
        tmp_path / "compiled.safetensors",
    )
    save_file(unet, tmp_path / "bare.safetensors")
    for name in ("compiled", "bare"):
        counts = to_folder(tmp_path / f"{name}.safetensors", tmp_path / name, deep)
        assert counts == {"unet": len(unet), "vae": 0, "text_encoder": 0}
        assert all(same(deep / file, tmp_path / name / file) for file in (UNET, VAE, TEXT))


@pytest.mark.parametrize("change", ["less", "more", "shape", "v_pred", "no unet"])
def test_a_file_that_does_not_fit_the_config_leaves_nothing(
    deep: Path, file: Path, tmp_path: Path, change: str
) -> None:
    held, name = load_file(file), "model.diffusion_model.middle_block.1.proj_in.weight"
    changed = {
        "less": {n: t for n, t in held.items() if n != name},
        "more": held | {"model.diffusion_model.middle_block.1.more.weight": torch.ones(2)},
        "shape": held | {name: torch.ones(3, 3)},
        "v_pred": held | {"v_pred": torch.ones(1)},
        "no unet": {n: t for n, t in held.items() if not n.startswith("model.")},
    }
    save_file(changed[change], tmp_path / "x.safetensors")
    with pytest.raises(
        InputError, match=r"does not fit --config|is marked v_pred|no tensor of a denoiser"
    ):
        to_folder(tmp_path / "x.safetensors", tmp_path / "out", deep)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "layers_per_block", [2, 2]), ("unet", "layers_per_block", None), ("unet", "layers_per_block", -1),
        ("unet", "layers_per_block", "2"), ("unet", "layers_per_block", 10**9), ("vae", "up_block_types", None),
        ("vae", "down_block_types", 3),
    ],
)  # fmt: skip
def test_a_config_that_the_converters_cannot_use_is_named(
    deep: Path, file: Path, tmp_path: Path, part: str, key: str, value: object
) -> None:
    config = tmp_path / "config"
    shutil.copytree(deep, config)
    path = config / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=r"diffusers cannot convert the|does not fit --config"):
        to_folder(file, tmp_path / "out", config)
    with pytest.raises(InputError):
        to_file(config, tmp_path / "out.safetensors")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()


def test_other_pipelines_are_refused_by_name(
    deep: Path, tiny: Path, file: Path, tmp_path: Path
) -> None:
    for source, message in ((tiny, "unet UNet2DModel"), (tmp_path, "not a pipeline folder")):
        with pytest.raises(InputError, match=message):
            to_file(source, tmp_path / "out.safetensors")
        with pytest.raises(InputError, match=message):
            to_folder(file, tmp_path / "out", source)
    other = tmp_path / "openclip"
    shutil.copytree(deep, other)
    path = other / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    with pytest.raises(InputError, match="an OpenCLIP text encoder"):
        to_file(other, tmp_path / "out.safetensors")
