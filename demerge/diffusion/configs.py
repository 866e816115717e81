"""The configs of diffusers and transformers that demerge reads, and the limits on what they build.

A config of a few bytes may ask for terabytes of weights, or for so many layers that making them
takes hours. So the number of layers is first compared with the tensors of the weights file. Then
the model is built without memory, and each name and shape is compared with the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from demerge.errors import InputError
from demerge.storage.schema import MAX_TIMESTEPS, Foreign, checked

MAX_LAYERS = 1024  # of one model; the largest have some hundred
MAX_PATCHES = 1 << 18  # that a transformer cuts an image into
DEPTHS = (
    "layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block",
    "num_layers", "num_hidden_layers", "num_res_blocks",
)  # fmt: skip
TENSORS = 2  # of the smallest layer: a weight and a bias

Side = Annotated[int, Field(ge=1, le=1 << 13)]
Width = Annotated[int, Field(ge=1, le=1 << 20)]
Widths = Annotated[tuple[Width, ...], Field(min_length=1, max_length=64)]
Beta = Annotated[float, Field(ge=0, le=1)]
Betas = Annotated[tuple[Beta, ...], Field(min_length=1, max_length=MAX_TIMESTEPS)]


class DenoiserConfig(Foreign):
    """A UNet's or transformer's config.json."""

    sample_size: Side | tuple[Side, Side]
    in_channels: Width = 1
    out_channels: Width | None = None
    patch_size: Width = 1
    num_class_embeds: Width | None = None
    num_embeds_ada_norm: Width | None = None
    block_out_channels: Widths | None = None
    num_attention_heads: Width | tuple[Width, ...] | None = None
    attention_head_dim: Width | tuple[Width, ...] | None = None
    pos_embed_max_size: Side | None = None


class FluxConfig(Foreign):
    """The config.json of a FluxTransformer2DModel; 4 latents are one of its `in_channels`."""

    in_channels: Annotated[int, Field(ge=4, le=1 << 20, multiple_of=4)] = 64
    out_channels: Width | None = None
    num_attention_heads: Width = 24
    attention_head_dim: Width = 128
    joint_attention_dim: Width = 4096
    pooled_projection_dim: Width = 768
    guidance_embeds: bool = False


class WanConfig(Foreign):
    """The config.json of a WanTransformer3DModel."""

    patch_size: tuple[Side, Side, Side] = (1, 2, 2)
    in_channels: Width = 16
    out_channels: Width | None = None
    num_attention_heads: Width = 40
    attention_head_dim: Width = 128
    text_dim: Width = 4096
    freq_dim: Width = 256
    ffn_dim: Width = 13_824
    rope_max_seq_len: Side = 1024


class VaeConfig(Foreign):
    """An autoencoder's config.json."""

    in_channels: Width = 3
    out_channels: Width = 3
    latent_channels: Width = 4
    block_out_channels: Widths = (64,)
    scaling_factor: Annotated[float, Field(gt=0)] = 0.18215
    shift_factor: float | None = None


class TAEF2Config(VaeConfig):
    """The config.json of an AutoencoderTAEF2."""

    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[Annotated[float, Field(gt=0)], ...] | None = None

    @model_validator(mode="after")
    def _check_channels(self) -> TAEF2Config:
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(f"{name} must have {self.latent_channels} numbers")
        return self


class WanVaeConfig(Foreign):
    """The config.json of an AutoencoderKLWan."""

    z_dim: Width = 16
    base_dim: Width = 96
    dim_mult: Widths = (1, 2, 4, 4)
    scale_factor_spatial: Side = 8
    latents_mean: tuple[float, ...]
    latents_std: tuple[Annotated[float, Field(gt=0)], ...]

    @model_validator(mode="after")
    def _check_channels(self) -> WanVaeConfig:
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(f"{name} must have {self.z_dim} numbers, as z_dim says")
        return self


class TextConfig(Foreign):
    """The config.json of a text encoder: CLIP, BERT or T5."""

    hidden_size: Width = 512
    d_model: Width = 512
    d_ff: Width = 2048
    d_kv: Width = 64
    num_heads: Width = 8
    intermediate_size: Width = 2048
    num_attention_heads: Width = 8
    max_position_embeddings: Width = 77
    vocab_size: Width = 49_408


class SchedulerConfig(Foreign):
    """A scheduler_config.json; the classes of diffusers have the same defaults."""

    num_train_timesteps: Annotated[int, Field(ge=1, le=MAX_TIMESTEPS)] = 1000
    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    beta_schedule: str = "linear"
    trained_betas: Betas | None = None
    prediction_type: str | None = "epsilon"
    steps_offset: Annotated[int, Field(ge=0, le=MAX_TIMESTEPS)] = 0
    clip_sample_range: Annotated[float, Field(gt=0)] = 1.0


CONFIGS: Mapping[str, type[Foreign]] = {  # of classes that have one of their own
    "FluxTransformer2DModel": FluxConfig,
    "WanTransformer3DModel": WanConfig,
    "AutoencoderKLWan": WanVaeConfig,
    "AutoencoderTAEF2": TAEF2Config,
}


def check_config(
    config: Mapping[str, Any], kind: type[Foreign], where: str, tensors: int | None = None
) -> None:
    """Check types and ranges of a config's values, and its layers against a file's `tensors`."""
    fix = "use the config of this very model"
    checked(config, kind, where, fix=fix)
    widths = (len(value) for value in config.values() if isinstance(value, list))
    layers = max(1, max(widths, default=1))
    for name in DEPTHS:
        layers *= max(1, _largest(config.get(name)))
    layers += _largest(config.get("num_single_layers"))
    most, held = MAX_LAYERS, f"at most {MAX_LAYERS:,}"
    if tensors is not None and tensors // TENSORS < MAX_LAYERS:
        most, held = tensors // TENSORS, f"{tensors:,} tensors"
    if layers > most:
        raise InputError(f"{where}: {layers:,} layers, the weights have {held}", fix=fix)
    patches = _largest(config.get("sample_size")) // max(1, _largest(config.get("patch_size")))
    if "num_layers" in config and patches**2 > MAX_PATCHES:
        what = f"{where}: images of {patches} x {patches} patches, at most {MAX_PATCHES:,}"
        raise InputError(what, fix=fix)


def _largest(value: Any) -> int:
    """Return the largest whole number in a number or nested lists."""
    if isinstance(value, list):
        return max((_largest(inner) for inner in value), default=0)
    return value if type(value) is int else 0
