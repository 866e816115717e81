"""The configs of diffusers and transformers that demerge reads, and the limits on what they build.

A config of a few bytes may ask for terabytes of weights, or for so many layers that making them
takes hours. So the number of layers is first compared with the tensors of the weights file. Then
the model is built without memory, and each name and shape is compared with the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from demerge.errors import InputError
from demerge.storage.schema import MAX_TIMESTEPS, Foreign, checked

MAX_LAYERS = 1024  # of one model; the largest have some hundred
MAX_PATCHES = 1 << 18  # that a transformer cuts an image into
DEPTHS = (
    "layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block",
    "num_layers", "num_hidden_layers", "num_single_layers",
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


class VaeConfig(Foreign):
    """An autoencoder's config.json."""

    in_channels: Width = 3
    out_channels: Width = 3
    latent_channels: Width = 4
    block_out_channels: Widths = (64,)
    scaling_factor: Annotated[float, Field(gt=0)] = 0.18215
    shift_factor: float | None = None


class TextConfig(Foreign):
    """A CLIP text encoder's config.json."""

    hidden_size: Width = 512
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
