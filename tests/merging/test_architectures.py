"""Every architecture we name: stock classes in, merged, and read back by stock classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from demerge.errors import UsageError
from demerge.lora import Adapter, open_expert
from demerge.merging import merge, merge_tensors, verify
from demerge.storage.checkpoint import Checkpoint, content_sha256
from demerge.timesteps import TimestepRange

NAMES = ("UNet2D", "SD 1.x", "SDXL", "DiT", "SD3", "Flux", "Wan")
Tensors = dict[str, torch.Tensor]


def moved(model: Any, seed: int) -> Any:
    """A copy of a model with other weights, like an expert."""
    other, g = type(model).from_config(model.config), torch.Generator().manual_seed(seed)
    tensors = {
        n: t + 0.01 * torch.randn(t.shape, generator=g) if t.is_floating_point() else t
        for n, t in model.state_dict().items()
    }
    other.load_state_dict(tensors)
    return other


def read(model: Any, folder: Path, **options: Any) -> Tensors:
    """What stock diffusers reads of a folder; nothing may be missing or left over."""
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return dict(loaded.state_dict())


def assert_same(one: Tensors, other: Tensors) -> None:
    assert set(one) == set(other)
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


def states(models: list[Any], names: Any) -> list[Tensors]:
    """Their tensors, but for buffers that are not stored."""
    return [{n: t for n, t in m.state_dict().items() if n in names} for m in models]


@pytest.mark.parametrize("name", NAMES)
def test_components_of_every_architecture(
    name: str, tmp_path: Path, tiny_denoiser: Callable[..., Any]
) -> None:
    base = tiny_denoiser(name)
    models = [base, moved(base, 1), moved(base, 2)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i), max_shard_size="20KB" if i == 1 else "10GB")
    paths = [tmp_path / str(i) for i in range(3)]
    stored = set(Checkpoint.open(paths[0]))
    origin, *experts = states(models, stored)
    for method in ("average", "ties"):
        merge(paths[0], paths[1:], tmp_path / method, method=method)
        assert_same(
            read(base, tmp_path / method),
            dict(base.state_dict()) | merge_tensors(origin, experts, method),
        )


def test_variants_are_read_by_name(tmp_path: Path, tiny_denoiser: Callable[..., Any]) -> None:
    base = tiny_denoiser("SD 1.x").half()
    expert = moved(base, 1).half()
    base.save_pretrained(tmp_path / "base", variant="fp16", max_shard_size="10KB")
    expert.save_pretrained(tmp_path / "expert", variant="fp16")
    save_file({"x": torch.ones(1)}, tmp_path / "expert" / "diffusion_pytorch_model.safetensors")
    merge(
        tmp_path / "base",
        [tmp_path / "expert"],
        tmp_path / "out",
        method="average",
        weights=[1],
        variant="fp16",
    )
    assert_same(read(base, tmp_path / "out", torch_dtype=torch.float16), dict(expert.state_dict()))


# -- old names of attention ------------------------------------------------------------------------

MANNER = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def age(folder: Path) -> Path:
    """Rename the attention of a saved component as diffusers named it in 2022."""
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for new, old in MANNER.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("old", ["base", "expert"])
def test_old_and_new_names_of_attention_are_the_same_tensors(
    old: str, tmp_path: Path, tiny_denoiser: Callable[..., Any]
) -> None:
    base = tiny_denoiser("UNet2D")
    expert = moved(base, 1)
    for name, model in (("base", base), ("expert", expert)):
        model.save_pretrained(tmp_path / name)
    record = {"range": [0, 500], "base_sha256": content_sha256(base.state_dict())}
    (tmp_path / "expert" / "expert.json").write_text(json.dumps(record))
    names = set(Checkpoint.open(age(tmp_path / old)))
    assert any(".proj_attn." in name for name in names)
    merge(
        tmp_path / "base",
        [tmp_path / "expert"],
        tmp_path / "out",
        method="task_arithmetic",
        weights=[0.5],
    )
    assert set(Checkpoint.open(tmp_path / "out")) == set(Checkpoint.open(tmp_path / "base"))
    expected = merge_tensors(dict(base.state_dict()), [dict(expert.state_dict())], weights=[0.5])
    assert_same(read(base, tmp_path / "out"), expected)


def test_tensors_that_a_method_needs_are_found_under_either_name(
    tmp_path: Path, tiny_denoiser: Callable[..., Any]
) -> None:
    base = tiny_denoiser("UNet2D")
    for i, model in enumerate([base, moved(base, 1), moved(base, 2)]):
        model.save_pretrained(tmp_path / str(i))
    for i in (1, 2):
        fisher = {n: torch.full_like(t, float(i)) for n, t in base.state_dict().items()}
        save_file(fisher, tmp_path / str(i) / "fisher.safetensors")
    out = [tmp_path / "new", tmp_path / "old"]
    merge(tmp_path / "0", [tmp_path / "1", tmp_path / "2"], out[0], method="fisher")
    merge(age(tmp_path / "0"), [tmp_path / "1", tmp_path / "2"], out[1], method="fisher")
    assert_same(read(base, out[0]), read(base, out[1]))


# -- pipelines of two denoisers --------------------------------------------------------------------

Pipeline = Callable[..., Path]


@pytest.fixture
def wan(tmp_path: Path) -> Pipeline:
    """wan(name, [models], boundary) -> a WanPipeline folder without text encoder and VAE."""

    def save(name: str, models: list[Any], boundary: float | None = None) -> Path:
        parts = dict(zip(("transformer", "transformer_2"), models, strict=False))
        nothing = dict.fromkeys(
            ("text_encoder", "tokenizer", "vae", "transformer", "transformer_2")
        )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipeline = diffusers.WanPipeline(
            **{**nothing, **parts}, scheduler=scheduler, boundary_ratio=boundary
        )
        pipeline.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def pair(folder: Path) -> list[Tensors]:
    """What stock diffusers reads of the two denoisers of a pipeline."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, text_encoder=None, tokenizer=None, vae=None
    )
    assert type(pipeline) is diffusers.WanPipeline
    return [dict(model.state_dict()) for model in (pipeline.transformer, pipeline.transformer_2)]


def test_two_denoisers_are_merged_with_their_counterparts(
    wan: Pipeline, tmp_path: Path, tiny_denoiser: Callable[..., Any]
) -> None:
    high, low = tiny_denoiser("Wan", 0), tiny_denoiser("Wan", 1)
    experts = [[moved(high, 10 * i), moved(low, 10 * i + 1)] for i in (1, 2)]
    base = wan("base", [high, low], 0.875)
    paths = [wan(str(i), models, 0.875) for i, models in enumerate(experts)]
    merge(base, paths, tmp_path / "out", method="ties")
    merged = pair(tmp_path / "out")
    for side, origin in enumerate((high, low)):
        given = [dict(models[side].state_dict()) for models in experts]
        assert_same(merged[side], merge_tensors(dict(origin.state_dict()), given, "ties"))
    assert (
        json.loads((tmp_path / "out" / "model_index.json").read_text())["boundary_ratio"] == 0.875
    )
    merge(
        base / "transformer_2",
        [p / "transformer_2" for p in paths],
        tmp_path / "low",
        method="ties",
    )
    assert_same(read(low, tmp_path / "low"), merged[1])


def test_an_expert_of_one_side_leaves_the_other(
    wan: Pipeline, tmp_path: Path, tiny_denoiser: Callable[..., Any]
) -> None:
    high, low = tiny_denoiser("Wan", 0), tiny_denoiser("Wan", 1)
    expert = moved(low, 2)
    other = wan("other", [moved(high, 3), expert], 0.875)
    merge(
        wan("base", [high, low], 0.875),
        [other / "transformer_2"],
        tmp_path / "out",
        method="average",
    )
    merged = pair(tmp_path / "out")
    assert_same(merged[0], dict(high.state_dict()))
    assert_same(merged[1], dict(expert.state_dict()))


def test_two_denoisers_are_two_experts_of_a_base_of_one(
    wan: Pipeline, tmp_path: Path, tiny_denoiser: Callable[..., Any]
) -> None:
    base = tiny_denoiser("Wan")
    models = [moved(base, 1), moved(base, 2)]
    merge(wan("base", [base]), [wan("two", models, 0.875)], tmp_path / "out", method="average")
    expected = merge_tensors(
        dict(base.state_dict()), [dict(m.state_dict()) for m in models], "average"
    )
    assert_same(read(base, tmp_path / "out" / "transformer"), expected)


def test_two_denoisers_alone_are_merged_into_one(
    wan: Pipeline, tmp_path: Path, tiny_denoiser: Callable[..., Any]
) -> None:
    two = [tiny_denoiser("Wan", 0), tiny_denoiser("Wan", 1)]
    folder, out = wan("two", two, 0.875), tmp_path / "out"
    merge(folder, [], out, method="average", no_base=True)
    pipeline = diffusers.WanPipeline.from_pretrained(
        out, text_encoder=None, tokenizer=None, vae=None
    )
    assert pipeline.transformer_2 is None and pipeline.config.boundary_ratio is None
    high, low = (dict(model.state_dict()) for model in two)
    mean = {name: (high[name] + low[name]) / 2 for name in high}
    assert_same(dict(pipeline.transformer.state_dict()), mean)
    assert not (out / "transformer_2").exists()
    assert list(verify(out).files) == ["transformer/diffusion_pytorch_model.safetensors"]
    with pytest.raises(UsageError, match="needs a base"):
        merge(folder, [], tmp_path / "ties", method="ties", no_base=True)
    with pytest.raises(UsageError, match="or a pipeline of two denoisers"):
        merge(out, [], tmp_path / "again", method="average", no_base=True)


def test_a_boundary_makes_a_pipeline_of_two(
    wan: Pipeline, tmp_path: Path, tiny_denoiser: Callable[..., Any]
) -> None:
    base = tiny_denoiser("Wan")
    models = [moved(base, i) for i in (1, 2, 3)]
    spans = [TimestepRange(0, 500), TimestepRange(500, 875), TimestepRange(875, 1000)]
    paths = []
    for i, (model, span) in enumerate(zip(models, spans, strict=True)):
        paths.append(wan(str(i), [model]))
        (paths[-1] / "expert.json").write_text(json.dumps({"range": [span.start, span.stop]}))
    merge(wan("base", [base]), paths, tmp_path / "out", method="average", boundary=0.875)
    high, low = pair(tmp_path / "out")
    origin, *given = [dict(m.state_dict()) for m in (base, *models)]
    assert_same(high, given[2])
    assert_same(low, merge_tensors(origin, given[:2], "average"))
    assert (
        json.loads((tmp_path / "out" / "model_index.json").read_text())["boundary_ratio"] == 0.875
    )
    again = tmp_path / "again"
    merge(tmp_path / "out", [tmp_path / "out"], again, method="average", weights=[1])
    assert [content_sha256(t) for t in pair(again)] == [content_sha256(t) for t in (high, low)]


# -- adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SDXL", "Flux"])
def test_an_adapter_in_and_an_adapter_out(
    name: str, tmp_path: Path, tiny_denoiser: Callable[..., Any]
) -> None:
    base = tiny_denoiser(name)
    base.save_pretrained(tmp_path / "base")
    tensors = dict(base.state_dict())
    prefix = "unet" if name == "SDXL" else "transformer"
    g = torch.Generator().manual_seed(0)
    factors = {}
    for weight in [
        n for n, t in tensors.items() if n.endswith(".weight") and t.ndim == 2 and min(t.shape) >= 4
    ][:6]:
        stem = f"{prefix}.{weight.removesuffix('.weight')}"
        factors[f"{stem}.lora_A.weight"] = torch.randn(2, tensors[weight].shape[1], generator=g)
        factors[f"{stem}.lora_B.weight"] = torch.randn(tensors[weight].shape[0], 2, generator=g)
    save_file(factors, tmp_path / "lora.safetensors")
    adapter = open_expert(tmp_path / "lora.safetensors", tensors)
    assert isinstance(adapter, Adapter) and len(adapter) == 6
    merge(
        tmp_path / "base",
        [tmp_path / "lora.safetensors"],
        tmp_path / "out",
        method="task_arithmetic",
        weights=[0.5],
    )
    assert_same(
        read(base, tmp_path / "out"), tensors | merge_tensors(tensors, [adapter], weights=[0.5])
    )
    merge(
        tmp_path / "base",
        [tmp_path / "lora.safetensors"],
        tmp_path / "half.safetensors",
        method="task_arithmetic",
        weights=[0.5],
        lora_rank=2,
    )
    half = open_expert(tmp_path / "half.safetensors", tensors)
    assert set(half) == set(adapter)
    for weight in adapter:
        torch.testing.assert_close(half[weight], adapter[weight] / 2, rtol=1e-4, atol=1e-5)


def test_links_of_the_hub_cache_are_followed(
    tmp_path: Path, tiny_denoiser: Callable[..., Any]
) -> None:
    base = tiny_denoiser("DiT")
    base.save_pretrained(tmp_path / "plain")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    blobs = tmp_path / "models--a--b" / "blobs"
    (snapshot / "transformer").mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.copy(file, blobs / str(i))
        (snapshot / "transformer" / file.name).symlink_to(f"../../../blobs/{i}")
    (snapshot / "model_index.json").write_text(
        json.dumps({"transformer": ["diffusers", "DiTTransformer2DModel"]})
    )
    merge(snapshot, [tmp_path / "plain"], tmp_path / "out", method="average", weights=[1])
    assert_same(read(base, tmp_path / "out" / "transformer"), dict(base.state_dict()))
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
