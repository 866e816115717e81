"""Single files in the LDM layout and pipeline folders: there and back to the bit, and as stock diffusers reads them."""

from __future__ import annotations

import inspect
import json
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


# -- other families --------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, Path]:
    """The file of each part with weights."""
    return {path.parent.name: path for path in sorted(folder.glob("*/*.safetensors"))}


def one_denoiser(folder: Path, out: Path) -> Path:
    """A copy of a pipeline without its second denoiser."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("transformer_2"))
    index = json.loads((out / "model_index.json").read_text())
    if "transformer_2" in index:
        index |= {"transformer_2": [None, None], "boundary_ratio": None}
        (out / "model_index.json").write_text(json.dumps(index))
    return out


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers' converter of Flux take 16 channels for the 3072 that it assumes."""
    from diffusers.loaders import single_file_model, single_file_utils

    name = "convert_flux_transformer_checkpoint_to_diffusers"
    source = textwrap.dedent(inspect.getsource(getattr(single_file_utils, name)))
    space: dict[str, Any] = dict(vars(single_file_utils))
    exec(source.replace("3072", "16"), space)
    classes = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    monkeypatch.setitem(classes["FluxTransformer2DModel"], "checkpoint_mapping_fn", space[name])


def test_sdxl_becomes_one_file_that_stock_diffusers_reads(
    tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    from diffusers import StableDiffusionXLPipeline

    folder, out = tiny_family("sdxl"), tmp_path / "xl.safetensors"
    to_file(folder, out)
    held = load_file(out)
    for name in (
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.input_blocks.3.1.transformer_blocks.1.attn2.to_k.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
        "conditioner.embedders.1.model.text_projection",
        "first_stage_model.encoder.conv_in.weight",
    ):
        assert any(key.startswith(name) for key in held), name
    loaded = StableDiffusionXLPipeline.from_single_file(
        str(out), config=str(folder), local_files_only=True
    )
    for part, file in weights(folder).items():
        if part == "text_encoder_2":  # diffusers tells it from the other by its width
            continue
        state = getattr(loaded, part).state_dict()
        for name, tensor in load_file(file).items():
            assert torch.equal(state[name], tensor), (part, name)
    counts = to_folder(out, tmp_path / "again", folder)
    assert all(counts.values()) and list(counts) == [
        "unet",
        "vae",
        "text_encoder",
        "text_encoder_2",
    ]
    for part, file in weights(folder).items():
        assert same(file, weights(tmp_path / "again")[part]), part


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("family", ["sd3", "flux", "wan"])
def test_transformers_become_folders_and_files(
    family: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    import diffusers

    base = one_denoiser(tiny_family(family), tmp_path / "base")
    file = tmp_path / "model.safetensors"
    to_file(base, file)
    held = load_file(file)
    assert all(name.startswith("model.diffusion_model.") for name in held)
    bare = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in held.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    for name in ("model", "bare"):
        counts = to_folder(tmp_path / f"{name}.safetensors", tmp_path / name, base)
        assert {part for part, count in counts.items() if count} == {"transformer"}
        for part, path in weights(base).items():
            assert same(path, weights(tmp_path / name)[part]), part
    kind = json.loads((base / "model_index.json").read_text())["_class_name"]
    getattr(diffusers, kind).from_pretrained(tmp_path / "bare")
    save_file(bare | {"blocks.0.more.weight": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(InputError, match=r"does not fit --config|does not know 1 tensors"):
        to_folder(tmp_path / "more.safetensors", tmp_path / "more", base)
    assert not (tmp_path / "more").exists()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_text_encoders_and_vae_of_a_single_file_are_taken_from_it(
    family: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    base = one_denoiser(tiny_family(family), tmp_path / "base")
    to_file(base, tmp_path / "denoiser.safetensors")
    held = load_file(tmp_path / "denoiser.safetensors")
    places = {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
    }
    if family == "flux":
        places["text_encoder_2"] = places.pop("text_encoder_3")
    for part, prefix in places.items():
        for name, tensor in load_file(weights(base)[part]).items():
            is_wrapped = family == "sd3" or part != "text_encoder" or name.startswith("text_model.")
            held[prefix + (name if is_wrapped else f"text_model.{name}")] = tensor + 1
    save_file(held, tmp_path / "all.safetensors")
    counts = to_folder(tmp_path / "all.safetensors", tmp_path / "out", base)
    assert all(counts[part] for part in places) and not counts["vae"]
    for part in places:
        one, other = load_file(weights(base)[part]), load_file(weights(tmp_path / "out")[part])
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name] + 1, other[name]) for name in one)


def test_a_pipeline_of_two_denoisers_is_refused(
    tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="transformer_2, a second denoiser"):
        to_file(tiny_family("wan"), tmp_path / "out.safetensors")


def test_a_part_that_has_no_place_in_the_file_is_refused(
    tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_family("sdxl"), base)
    index = json.loads((base / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="this kind of pipeline is not converted: vae"):
        to_file(base, tmp_path / "out.safetensors")
