"""Other parts of pipelines: text encoders and VAEs, noise schedules, variants."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from demerge.diffusion.model import Diffusion
from demerge.errors import InputError, UsageError
from demerge.merging import MergeSession, Recipe, merge, verify
from demerge.merging import plan as plan_merge

UNET = Path("unet/diffusion_pytorch_model.safetensors")
VAE = Path("vae/diffusion_pytorch_model.safetensors")
TEXT = Path("text_encoder/model.safetensors")
FILES = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
Tune = Callable[..., Path]


@pytest.fixture
def tune(tiny_text: Path, tmp_path: Path) -> Tune:
    """tune(name, parts) -> a copy of the tiny text pipeline with other weights in these parts."""

    def make(name: str, *parts: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_text, folder)
        for i, part in enumerate(parts):
            g = torch.Generator().manual_seed(i + len(name))
            held = load_file(folder / FILES[part])
            moved = {
                n: t + 0.1 * torch.randn(t.shape, generator=g) if t.is_floating_point() else t
                for n, t in held.items()
            }
            save_file(moved, folder / FILES[part], {"format": "pt"})
        return folder

    return make


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_other_parts_are_refused_kept_or_merged(
    tiny_text: Path, tune: Tune, tmp_path: Path
) -> None:
    expert = tune("expert", "unet", "vae", "text_encoder")
    with pytest.raises(
        InputError, match=r"has another (?:vae|text_encoder) and (?:vae|text_encoder) than"
    ) as error:
        merge(tiny_text, [expert], tmp_path / "out", weights=[1])
    assert "--components denoiser" in error.value.fix and "--components all" in error.value.fix
    expected = {
        "denoiser": ["unet"],
        "all": list(FILES),
        "denoiser,vae": ["unet", "vae"],
        "text_encoder,unet": ["unet", "text_encoder"],
    }
    for asked, merged in expected.items():
        out = tmp_path / asked
        merge(tiny_text, [expert], out, weights=[1], components=asked)
        for part, file in FILES.items():
            assert same(out / file, (expert if part in merged else tiny_text) / file), (asked, part)
        card = (out / "README.md").read_text()
        assert ("not used" in card) == (len(merged) < 3)


def test_all_parts_merge_by_the_same_method_and_verify(
    tiny_text: Path, tune: Tune, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    one, other = tune("one", "unet", "text_encoder"), tune("other", "unet")
    merge(tiny_text, [one, other], tmp_path / "out", components="all")
    base, a, merged = (load_file(p / TEXT) for p in (tiny_text, one, tmp_path / "out"))
    for name, value in base.items():
        torch.testing.assert_close(
            merged[name], (value + a[name]) / 2
        )  # the other expert has the base's text encoder
    assert same(tmp_path / "out" / VAE, tiny_text / VAE)
    recipe = Recipe.read(tmp_path / "out")
    assert (
        set(verify(tmp_path / "out", recipe).files)
        == {UNET.as_posix(), TEXT.as_posix()}
        == set(recipe.output)
    )
    StableDiffusionPipeline.from_pretrained(tmp_path / "out")


def test_what_reads_denoisers_alone_says_what_it_does_not_look_at(
    tiny_text: Path, tune: Tune
) -> None:
    alike, other = tune("alike", "unet"), tune("other", "unet", "vae", "text_encoder")
    assert MergeSession(str(tiny_text), [str(alike)]).notes == []
    (note,) = MergeSession(str(tiny_text), [str(alike), str(other)]).notes
    assert "vae" in note and "text_encoder" in note and str(other) in note


def test_equal_parts_in_another_dtype_or_without_position_ids_are_equal(
    tiny_text: Path, tune: Tune, tmp_path: Path
) -> None:
    expert = tune("expert", "unet")
    save_file({n: t.half() for n, t in load_file(expert / VAE).items()}, expert / VAE)
    held = load_file(expert / TEXT)
    save_file(held | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, expert / TEXT)
    assert not plan_merge(Recipe.of(tiny_text, [expert], weights=[1])).notes
    edit(expert / "vae" / "config.json", scaling_factor=0.5)
    with pytest.raises(
        InputError, match=r"another vae than .* \(vae: scaling_factor 0\.5 for"
    ) as error:
        plan_merge(Recipe.of(tiny_text, [expert], weights=[1]))
    assert error.value.fix == "give --components denoiser to keep the base's"
    with pytest.raises(InputError, match=r"scaling_factor 0\.5 for"):
        plan_merge(Recipe.of(tiny_text, [expert], weights=[1], components="all"))


def test_refusals(tiny_text: Path, tune: Tune) -> None:
    expert = tune("expert", "unet", "vae")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"components": "tokenizer_9,denoiser"}, "the base has no 'tokenizer_9'"),
        ({"components": "vae"}, "leaves the denoiser out"),
        ({"components": "all", "only": ["mid"]}, "--only merges a part"),
        ({"components": "all", "lora_rank": 2}, "a LoRA is made for a denoiser of the base"),
        ({"components": "all", "method": "fisher"}, "needs fisher"),
    ]
    for asked, message in cases:
        with pytest.raises(UsageError, match=message):
            plan_merge(Recipe.of(tiny_text, [expert], **asked))
    with pytest.raises(UsageError, match="--components is for folders"):
        plan_merge(Recipe.of(tiny_text / UNET, [expert / UNET], components="denoiser"))
    assert not plan_merge(Recipe.of(tiny_text, [expert], only=["mid"])).notes
    assert not plan_merge(Recipe.of(tiny_text, [expert / "unet"], weights=[1])).notes


@pytest.mark.parametrize("name", ["..", "../base", "a/b", "", "x" * 300, "\u4e00" * 99])
def test_a_part_with_a_hostile_name_is_refused(tiny_text: Path, tune: Tune, name: str) -> None:
    expert = tune("expert", "unet")
    edit(expert / "model_index.json", **{name: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(InputError, match="is not a name of a component"):
        plan_merge(Recipe.of(tiny_text, [expert]))


# -- schedules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        {"beta_end": 0.012}, {"beta_schedule": "scaled_linear"}, {"num_train_timesteps": 500},
        {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}, {"trained_betas": [0.1, 0.2]},
    ],
)  # fmt: skip
def test_another_schedule_is_refused(tiny: Path, tmp_path: Path, field: dict[str, Any]) -> None:
    expert = tmp_path / "expert"
    shutil.copytree(tiny, expert)
    edit(expert / "scheduler" / "scheduler_config.json", **field)
    name, value = next(iter(field.items()))
    with pytest.raises(InputError, match="has another noise schedule than") as error:
        plan_merge(Recipe.of(tiny, [expert], weights=[1]))
    assert f"{name.replace('_', ' ')} {value}" in error.value.what


def test_another_sampler_is_no_other_schedule(tiny: Path, tmp_path: Path) -> None:
    expert = tmp_path / "expert"
    shutil.copytree(tiny, expert)
    changed = {
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "steps_offset": 1,
    }
    edit(expert / "scheduler" / "scheduler_config.json", **changed)
    plan_merge(Recipe.of(tiny, [expert], weights=[1]))


def test_a_denoiser_of_another_function_is_refused(tiny: Path, tmp_path: Path) -> None:
    expert = tmp_path / "expert"
    shutil.copytree(tiny, expert)
    edit(expert / "unet" / "config.json", norm_eps=1e-3)
    with pytest.raises(
        InputError, match=r"another denoiser than .*: the norm eps 0\.001, not 1e-05"
    ):
        plan_merge(Recipe.of(tiny, [expert], weights=[1]))


# -- variants --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [False, True])
def test_a_pipeline_in_half_precision_alone_loads_in_stock_diffusers(
    tiny_text: Path, tmp_path: Path, shards: bool
) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_text).to(dtype=torch.float16)
    base, out = tmp_path / "base", tmp_path / "out"
    pipeline.save_pretrained(base, variant="fp16", max_shard_size="20KB" if shards else "1GB")
    assert not (base / UNET).exists()
    merge(base, [base], out, variant="fp16", weights=[1])
    names = {p.name for p in out.rglob("*.safetensors*") if "-of-" not in p.name}
    assert not any("fp16" in name for name in names)
    loaded = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float16)
    for part in FILES:
        one, other = getattr(loaded, part).state_dict(), getattr(pipeline, part).state_dict()
        assert all(torch.equal(one[n], other[n]) for n in other), part
    assert Diffusion.load(out).parameters == sum(p.numel() for p in pipeline.unet.parameters())


def test_one_variant_of_several_is_copied(tiny_text: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_text, base)
    for file in FILES.values():
        half = {n: t.half() for n, t in load_file(base / file).items()}
        save_file(half, (base / file).with_suffix(".fp16.safetensors"), {"format": "pt"})
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        out = tmp_path / f"out-{variant}"
        merge(base, [base], out, variant=variant, weights=[1])
        assert not list(out.rglob("*fp16*"))
        assert {
            t.dtype
            for f in FILES.values()
            for t in load_file(out / f).values()
            if t.is_floating_point()
        } == {dtype}
