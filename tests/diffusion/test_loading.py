"""Pipelines are loaded strictly: no weight at random, no model larger than its file, nothing from outside of the folder."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from demerge.diffusion.loading import load_denoiser, load_text, load_vae
from demerge.diffusion.model import Diffusion
from demerge.errors import InputError, ResourceError
from demerge.inspection import inspect_model
from demerge.merging.inputs.experts import find_scheduler_config
from demerge.storage.layout import locate
from demerge.storage.safetensors_header import read_json

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
parts = pytest.mark.parametrize("part", FILES)


@pytest.fixture
def copy(tiny_text: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_text, tmp_path / "copy")
    return tmp_path / "copy"


def changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path) -> InputError:
    before = time.monotonic()
    with pytest.raises(InputError) as refused:
        Diffusion.load(folder)
    assert time.monotonic() - before < 2
    assert refused.value.fix
    return refused.value


def test_components_are_those_that_the_libraries_load(tiny_text: Path) -> None:
    text = load_text(str(tiny_text))
    assert text is not None
    stock = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(tiny_text / "unet"),
        "vae": diffusers.AutoencoderKL.from_pretrained(tiny_text / "vae"),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(
            tiny_text / "text_encoder", dtype=torch.float32
        ),
    }
    own: dict[str, Any] = {
        "unet": load_denoiser(str(tiny_text)),
        "vae": load_vae(str(tiny_text)),
        **text.modules,
    }
    for name, theirs in stock.items():
        mine = own[name]
        assert type(mine) is type(theirs)
        for kind in ("state_dict", "named_buffers"):
            ours, others = dict(getattr(mine, kind)()), dict(getattr(theirs, kind)())
            assert list(ours) == list(others)
            assert all(torch.equal(ours[key], others[key]) for key in ours)
    ids = torch.tensor([[1, 2, 3, 53]])
    assert torch.equal(own["text_encoder"].eval()(ids)[0], stock["text_encoder"].eval()(ids)[0])


@parts
@pytest.mark.parametrize("how", ["missing", "unknown", "of another shape"])
def test_each_component_has_all_of_its_keys(copy: Path, part: str, how: str) -> None:
    file = copy / part / FILES[part]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if how == "missing":
        del tensors[name]
    elif how == "unknown":
        name = "more.weight"
        tensors[name] = torch.ones(2)
    else:
        tensors[name] = torch.ones(3, 1)
    save_file(tensors, file)
    what = refusal(copy).what
    assert FILES[part] in what and f"/{part}" in what and f"1 {how}: {name}" in what


def test_position_ids_of_older_files_are_a_constant(copy: Path) -> None:
    file = copy / "text_encoder" / FILES["text_encoder"]
    old = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file({**old, "text_model.embeddings.position_ids": torch.arange(16)[None]}, file)
    assert Diffusion.load(copy).text is not None


@parts
def test_pickles_are_for_convert(copy: Path, part: str) -> None:
    file = copy / part / FILES[part]
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    refused = refusal(copy)
    assert "pickled" in refused.what
    assert refused.fix == f"demerge convert {file.with_suffix('.bin')} {file} --allow-pickle"


def test_an_only_variant_is_taken(copy: Path) -> None:
    for part, name in FILES.items():
        file = copy / part / name
        halves = {key: tensor.half() for key, tensor in load_file(file).items()}
        file.unlink()
        save_file(halves, file.with_name(name.replace(".", ".fp16.")))
    model = Diffusion.load(copy)
    assert {p.dtype for module in (model.denoiser, model.vae) for p in module.parameters()} == {
        torch.float32
    }  # type: ignore[union-attr]
    save_file(halves, file.with_name(FILES["text_encoder"].replace(".", ".bf16.")))
    assert "several variants" in refusal(copy).what


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("vae", "AutoencoderKLWan"),
        ("text_encoder", "T5EncoderModel"),
        ("unet", "UNet3DConditionModel"),
    ],
)
def test_other_classes_are_refused(copy: Path, part: str, kind: str) -> None:
    changed(copy / "model_index.json", **{part: ["library", kind]})
    assert kind in refusal(copy).what


def test_parts_that_are_null_are_not_there(copy: Path) -> None:
    changed(copy / "model_index.json", vae=[None, None], text_encoder=[None, None])
    model = Diffusion.load(copy)
    assert model.vae is None and model.text is None


BOMBS: dict[str, tuple[str, dict[str, Any]]] = {
    "layers": ("unet", {"layers_per_block": 3000}),
    "listed layers": ("unet", {"layers_per_block": [1, 3000]}),
    "blocks": (
        "unet",
        {"down_block_types": ["DownBlock2D"] * 10_000, "up_block_types": ["UpBlock2D"] * 10_000}
        | {"block_out_channels": [8] * 10_000},
    ),
    "transformer layers": ("unet", {"transformer_layers_per_block": [[1, 2], 100_000]}),
    "16 TB": ("unet", {"block_out_channels": [1 << 20, 1 << 20]}),
    "width": ("unet", {"cross_attention_dim": 1 << 40}),
    "layers of the VAE": ("vae", {"layers_per_block": 5000}),
    "blocks of the VAE": ("vae", {"block_out_channels": [8] * 5000}),
    "width of the VAE": ("vae", {"block_out_channels": [1 << 20, 1 << 20]}),
    "layers of the text encoder": ("text_encoder", {"num_hidden_layers": 100_000}),
    "width of the text encoder": ("text_encoder", {"hidden_size": 1 << 20}),
    "vocabulary": ("text_encoder", {"vocab_size": 1 << 40}),
}


@pytest.mark.parametrize(("part", "changes"), BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_before_anything_is_built(
    copy: Path, part: str, changes: dict[str, Any]
) -> None:
    changed(copy / part / "config.json", **changes)
    assert part in refusal(copy).what


@pytest.mark.parametrize(
    "changes", [{"num_layers": 100_000}, {"sample_size": 8192, "patch_size": 1}]
)
def test_bombs_in_a_transformer(tiny_dit: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(tiny_dit, tmp_path / "m")
    changed(tmp_path / "m" / "transformer" / "config.json", **changes)
    refusal(tmp_path / "m")


def test_bombs_that_are_to_be_made(tmp_path: Path) -> None:
    unet: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [1 << 19, 1 << 19],
    }
    unet |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    for changes in ({}, {"layers_per_block": 5000, "block_out_channels": [32, 32]}):
        (tmp_path / "c.json").write_text(json.dumps({"unet": {**unet, **changes}, "scheduler": {}}))
        before = time.monotonic()
        with pytest.raises((InputError, ResourceError), match="unet"):
            Diffusion.random(tmp_path / "c.json", seed=0)
        assert time.monotonic() - before < 2


@pytest.mark.parametrize("value", [None, "8", -8, 0, 1.5, True, [8], [8, 8, 8], {}, 1 << 40])
@pytest.mark.parametrize("key", ["sample_size", "in_channels"])
def test_values_of_configs_are_typed(copy: Path, key: str, value: Any) -> None:
    changed(copy / "unet" / "config.json", **{key: value})
    assert refusal(copy).what.startswith(f"{copy}/unet/config.json: {key}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("num_train_timesteps", value)
            for value in (None, "1000", 0, -1, True, 1.5, 1 << 40, [1000])
        ),
        *(("beta_end", value) for value in (None, "x", -1, 2, 1e300)),
        *(
            ("trained_betas", value)
            for value in ([], [2.0], "x", [[1], [2, 3]], [0.1] * 7, {"x": 1})
        ),
        *(("beta_schedule", value) for value in (None, "unknown", 5)),
        ("prediction_type", 5),
        ("steps_offset", -5),
    ],
)
def test_values_of_schedules_are_typed(copy: Path, key: str, value: Any) -> None:
    changed(copy / "scheduler" / "scheduler_config.json", **{key: value})
    assert "scheduler" in refusal(copy).what


def test_a_tokenizer_of_another_encoder_is_refused(copy: Path) -> None:
    changed(copy / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    assert "texts of up to" in refusal(copy).what


LINKED = (
    "vae",
    "text_encoder/model.safetensors",
    "tokenizer",
    "scheduler/scheduler_config.json",
    "unet/config.json",
)


@pytest.mark.parametrize("name", LINKED)
def test_a_part_that_is_linked_out_is_refused(copy: Path, name: str) -> None:
    outside = copy.parent / "outside"
    shutil.move(copy / name, outside)
    (copy / name).symlink_to(outside)
    assert "leads out of" in refusal(copy).what


def test_what_is_copied_into_an_expert_lies_in_the_base(copy: Path, tmp_path: Path) -> None:
    model = Diffusion.load(copy)
    (tmp_path / "secret").write_text("secret")
    (copy / "vae" / "notes.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "expert").mkdir()
    with pytest.raises(InputError, match="leads out of"):
        model.save(tmp_path / "expert")


def cached(base: Path, root: Path, blobs: str = "blobs") -> Path:
    """Lay a pipeline out as the Hub's cache does: snapshots of links into blobs."""
    store, snapshot = root / "models--a--b" / blobs, root / "models--a--b" / "snapshots" / "0123"
    store.mkdir(parents=True)
    for i, file in enumerate(sorted(path for path in base.rglob("*") if path.is_file())):
        shutil.copyfile(file, store / str(i))
        link = snapshot / file.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(store / str(i))
    return snapshot


def test_blobs_of_the_hub_cache_are_followed_and_nothing_else_of_it(
    tiny_text: Path, tmp_path: Path
) -> None:
    assert (
        Diffusion.load(cached(tiny_text, tmp_path / "hub")).sha256
        == Diffusion.load(tiny_text).sha256
    )
    assert "leads out of" in refusal(cached(tiny_text, tmp_path / "other", blobs="others")).what


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "name",
    ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"],
)
def test_a_scheduler_as_diffusers_saves_it_is_read(copy: Path, name: str) -> None:
    """A DPM-Solver's config holds -Infinity (`lambda_min_clipped`), which is not JSON; identity and fingerprint are."""
    getattr(diffusers, name)().save_pretrained(copy / "scheduler")
    index = read_json(copy / "model_index.json")
    (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    model = Diffusion.load(copy)
    json.dumps(model.identity, allow_nan=False)
    assert len(model.fingerprint) == 64 and inspect_model(copy).scheduler == name
    assert find_scheduler_config(locate(copy))["_class_name"] == name


def test_a_scheduler_whose_numbers_are_none_is_refused(copy: Path) -> None:
    (copy / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "DDPMScheduler", "beta_end": Infinity}'
    )
    assert "beta_end" in str(refusal(copy))
    (copy / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "DDPMScheduler", "lambda_min_clipped": NaN}'
    )
    assert "NaN is not a finite number" in str(refusal(copy))
