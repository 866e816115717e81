"""Fixtures of several test modules: tiny models of the stock classes, made from a fixed seed.

The tests have a cache folder of their own: in the user's, the memory of hashes may be long, and each
test would read all of it. The fonts of matplotlib stay where they are.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of torch do not survive a fork
import torch
from hypothesis import settings
from PIL import Image
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
gc.disable()  # no import leaves garbage worth the search
USERS_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
CACHE = tempfile.TemporaryDirectory(prefix="demerge-tests-")  # removed in the end
os.environ.setdefault("MPLCONFIGDIR", str(USERS_CACHE / "matplotlib"))
os.environ["XDG_CACHE_HOME"] = CACHE.name
settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")


def pytest_collection_finish() -> None:
    """Collect garbage again, but not among the modules."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)  # a tenth of the searches
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    """Merge without workers unless a test asks for some: two forks cost more than a tiny merge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_values_for_empty_weights() -> Iterator[None]:
    """Do not initialize tensors without memory: torch does it slowly, and they are loaded next."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_uniform_", "normal_", "ones_", "uniform_", "zeros_"):
            patch.setattr(nn.init, name, unless_empty(getattr(nn.init, name)))
        yield


def unless_empty(initialize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what initializes a tensor if it has memory."""

    def wrapped(tensor: Tensor, *values: Any, **options: Any) -> Tensor:
        return tensor if tensor.is_meta else initialize(tensor, *values, **options)

    return wrapped


@pytest.fixture(scope="session", autouse=True)
def empty_loss_plots() -> Iterator[None]:
    """Leave the plots of losses empty: one takes as long as a tiny training."""
    from matplotlib.figure import Figure

    empty = ModuleType("demerge.finetuning.loss_plot")
    empty.draw_losses = lambda *_: Figure()  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, empty.__name__, empty)
        yield


def tiny_unet(**changes: object) -> torch.nn.Module:
    """Make a UNet2DModel of some 20,000 parameters on 8 x 8 images."""
    import diffusers

    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**{**config, **changes})


def save_tiny(
    folder: Path, *, prediction_type: str = "epsilon", seed: int = 0, **changes: object
) -> Path:
    """Save a DDPMPipeline around a tiny UNet, linear betas, T = 1000."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scheduler = diffusers.DDPMScheduler(
            num_train_timesteps=1000, prediction_type=prediction_type
        )
        diffusers.DDPMPipeline(tiny_unet(**changes), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def make_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Make tiny pipelines: make_tiny(prediction_type="epsilon", seed=0) -> folder."""
    numbers = itertools.count()
    return lambda **options: save_tiny(tmp_path / f"tiny-{next(numbers)}", **options)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DDPMPipeline folder: UNet2DModel, 8 x 8 x 1, epsilon, T = 1000."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny StableDiffusionPipeline with an AutoencoderKL; 16 x 16 x 3 images."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("text")
    tokenizer = _clip_tokenizer(folder)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = _tiny_vae()
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(scope="session")
def tiny_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DiTPipeline of 10 classes with a learned variance; 16 x 16 x 3 images."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_embeds_ada_norm=10,
    )
    folder = tmp_path_factory.mktemp("dit") / "base"
    diffusers.DiTPipeline(transformer, _tiny_vae(), diffusers.DDIMScheduler()).save_pretrained(
        folder
    )
    return folder


UNET = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (4, 8), "norm_num_groups": 2}
CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
ATTN = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "UNet2D": ("UNet2DModel", {**UNET, **ATTN, "attention_head_dim": 4}),
    "SD 1.x": (
        "UNet2DConditionModel",
        {**UNET, **CROSS, "attention_head_dim": 2, "cross_attention_dim": 6},
    ),
    "SDXL": (
        "UNet2DConditionModel",
        {
            **UNET,
            **CROSS,
            **SDXL,
            "attention_head_dim": (1, 2),
            "cross_attention_dim": 6,
            "use_linear_projection": True,
        },
    ),
    "DiT": (
        "DiTTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 8},
    ),
    "SD3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 4,
        }
        | {
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "caption_projection_dim": 8,
            "pooled_projection_dim": 8,
        }
        | {"out_channels": 4, "pos_embed_max_size": 8},
    ),
    "Flux": (
        "FluxTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
        }
        | {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4)},
    ),
    "Wan": ("WanTransformer3DModel", {**WAN, "ffn_dim": 16, "num_layers": 1}),
}


@pytest.fixture(scope="session")
def tiny_denoiser() -> Callable[..., Any]:
    """Make a tiny denoiser of a stock class: tiny_denoiser("Flux", seed=0, num_layers=2)."""
    import diffusers

    def make(name: str, seed: int = 0, **changes: object) -> Any:
        kind, config = MODELS[name]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return getattr(diffusers, kind)(**{**config, **changes})

    return make


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a tiny stock pipeline of 16 x 16 x 3 images: sdxl, sd3, flux, wan (two denoisers) or bert.

    wan needs `resolution=16`; bert is a UNet with a BERT and an AutoencoderTiny; taef2 is bert with
    an AutoencoderTAEF2 and an attention mask.
    """
    makers = {"sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "wan": _wan, "bert": _bert}
    makers["taef2"] = _taef2
    folder = tmp_path_factory.mktemp("families")

    @functools.cache
    def make(name: str) -> Path:
        torch.manual_seed(0)
        makers[name](folder).save_pretrained(folder / name)
        return folder / name

    return make


def _sdxl(folder: Path) -> Any:
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 48,
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    clip = _clip_tokenizer(folder)
    encoders = _clip_encoder("CLIPTextModel"), _clip_encoder("CLIPTextModelWithProjection")
    return diffusers.StableDiffusionXLPipeline(
        _tiny_vae(), *encoders, clip, clip, unet, scheduler, add_watermarker=False
    )


def _sd3(folder: Path) -> Any:
    import diffusers

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    clip, projected = _clip_tokenizer(folder), "CLIPTextModelWithProjection"
    return diffusers.StableDiffusion3Pipeline(
        transformer,
        scheduler,
        _tiny_vae(shift_factor=0.06),
        _clip_encoder(projected),
        clip,
        _clip_encoder(projected),
        clip,
        _t5_encoder("T5", 32),
        _t5_tokenizer(),
    )


def _flux(folder: Path) -> Any:
    import diffusers

    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        _tiny_vae(shift_factor=0.06),
        _clip_encoder("CLIPTextModel"),
        _clip_tokenizer(folder),
        _t5_encoder("T5", 16),
        _t5_tokenizer(),
        transformer,
    )


def _wan(folder: Path) -> Any:
    import diffusers

    transformers = [
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
        )
        for _ in range(2)
    ]
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, 0.2, 0.0, -0.1],
        latents_std=[1.2, 0.9, 1.0, 1.1],
        scale_factor_spatial=2,
        scale_factor_temporal=1,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        _t5_tokenizer(),
        _t5_encoder("UMT5", 16),
        vae,
        scheduler,
        *transformers,
        boundary_ratio=0.875,
    )


def _bert(folder: Path) -> Any:
    import diffusers
    import transformers

    (folder / "bert.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat"]))
    tokenizer = transformers.BertTokenizer(str(folder / "bert.txt"), model_max_length=8)
    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.BertModel(config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _taef2(folder: Path) -> Any:
    from demerge.diffusion.families.taef2 import AutoencoderTAEF2

    pipeline = _bert(folder)
    pipeline.text_encoder.config.use_attention_mask = True
    statistics = {"latents_mean": (0.1, 0.2, 0.3, 0.4), "latents_std": (0.5, 1.0, 1.5, 2.0)}
    vae = AutoencoderTAEF2(latent_channels=4, block_out_channels=(8, 8), **statistics)
    pipeline.register_modules(vae=vae)
    return pipeline


def _tiny_vae(**changes: Any) -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **changes,
    )


def _clip_encoder(name: str) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=52,
        eos_token_id=53,
    )
    return getattr(transformers, name)(config)


def _t5_encoder(name: str, width: int) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=30, d_model=width, d_ff=16, d_kv=8, num_heads=2, num_layers=1
    )
    return getattr(transformers, f"{name}EncoderModel")(config)


def _t5_tokenizer() -> Any:
    import transformers

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    letters = [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return transformers.T5Tokenizer(vocab=special + letters, extra_ids=0)


def _clip_tokenizer(folder: Path) -> Any:
    import transformers

    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {
        token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


@pytest.fixture
def add_expert(tiny: Path) -> Callable[..., Path]:
    """Save a copy of the tiny base as an expert: add_expert(folder, start, stop) -> folder."""

    def add(folder: Path, start: int, stop: int) -> Path:
        shutil.copytree(tiny, folder)
        (folder / "expert.json").write_text(
            json.dumps({"format": "demerge.expert/1", "range": [start, stop]})
        )
        return folder

    return add


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder of six 20 x 16 colour images with captions in metadata.jsonl."""
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (6, 16, 20, 3), dtype=np.uint8)
    for i, array in enumerate(noise):
        Image.fromarray(array).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) for i in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def protocol(**changes: object) -> Any:
    from demerge.evaluation.scores import Protocol

    fields: dict[str, object] = {
        "features": "digits-cnn",
        "features_sha256": "ab" * 32,
        "preprocess": "grey 8x8",
        "distance": "FD[digits-cnn]",
        "dim": 64,
        "num_images": 2000,
        "reference": "digits test",
        "reference_n": 500,
        "reference_sha256": "cd" * 32,
        "sampler": "ddim",
        "steps": 50,
    }
    return Protocol(**{**fields, **changes})


@pytest.fixture(scope="session")
def make_scores() -> Callable[..., list[Any]]:
    """Make scores of a model, one per distance: make_scores("ties", "merge", [7.1, 7.2])."""
    from demerge.evaluation.metrics.range_losses import RangeLosses
    from demerge.evaluation.scores import Scores

    def make(
        model: str, kind: Any, distances: list[float], *, shift: float = 0.0, **changes: object
    ) -> list[Scores]:
        losses = RangeLosses(
            ("0000-0500", "0500-1000"),
            tuple(tuple(1 + shift + b / 100 for b in range(4)) for _ in range(2)),
        )
        return [
            Scores(
                model,
                {
                    "fd": value,
                    "kid": value / 10,
                    "precision": 0.9,
                    "recall": 0.8,
                    "density": 1.0,
                    "coverage": 0.7,
                },
                protocol(**changes),
                "ef" * 32,
                seed,
                kind,
                losses=None if kind == "real" else losses,
            )
            for seed, value in enumerate(distances)
        ]

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs an accelerator, and say so, if there is none."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an accelerator")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
