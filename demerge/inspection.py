"""What a model is, from its headers and configs alone: no weight is read, torch is not imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demerge.expert import find_expert_range, find_noise_side
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.hub import resolve_model_path
from demerge.storage.layout import PROJECTED, locate
from demerge.storage.safetensors_header import read_json, read_scheduler

MODEL_CLASSES = (
    "UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "Transformer2DModel",
    "SD3Transformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel",
)  # fmt: skip
PACKED = ("FluxTransformer2DModel",)  # their input is 2 x 2 latents side by side
Reader = Callable[[Path], dict[str, Any]]
FACTORS = (
    "lora_A", "lora_B", "lora_up", "lora_down", "lora.up", "lora.down", "hada_w", "lokr_w"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model; None if its files do not say it.

    Attributes:
        range: [start, stop) of an expert.
        noise: high or low, if the name says that it is one of Wan 2.2's two experts.
        merged_by: the method, if demerge merged it.
        mergeable: whether `demerge merge` accepts it.
        note: what else a user should know, for example what the other commands need.
    """

    path: str
    kind: str
    model_class: str | None
    pipeline: str | None
    parameters: int
    tensors: int
    dtypes: list[str]
    bytes: int
    sample_size: Any
    prediction_type: str | None
    scheduler: str | None
    timesteps: int | None
    range: list[int] | None
    noise: str | None
    merged_by: str | None
    mergeable: bool
    note: str

    def document(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Return the known facts for a person, as (name, value)."""
        facts = self.document().items()
        return [(n.replace("_", " "), _as_text(v)) for n, v in facts if v not in (None, "", [])]


def inspect_model(path: str | Path) -> ModelFacts:
    """Read what a model is.

    Raises:
        InputError: if a file is missing, damaged or hostile.
    """
    checkpoint = Checkpoint(locate(resolve_model_path(path), projected=True))
    place, config = checkpoint.place, checkpoint.config or {}
    folder, span = place.pipeline, find_expert_range(place)
    recipe = _read(place.find_file("demerge.json"))
    scheduler = index = vae = {}
    if folder is not None:
        scheduler = _read(folder / "scheduler" / "scheduler_config.json", read_scheduler)
        index, vae = _read(folder / "model_index.json"), _read(folder / "vae" / "config.json")
    mergeable, note = _judge(checkpoint, vae.get("latent_channels", vae.get("z_dim")))
    return ModelFacts(
        path=str(path),
        kind="pipeline" if folder else "component" if place.component else "file",
        model_class=config.get("_class_name"),
        pipeline=index.get("_class_name"),
        parameters=checkpoint.parameters,
        tensors=len(checkpoint),
        dtypes=checkpoint.dtypes,
        bytes=sum(file.stat().st_size for file in place.files),
        sample_size=config.get("sample_size"),
        prediction_type=scheduler.get("prediction_type"),
        scheduler=scheduler.get("_class_name"),
        timesteps=scheduler.get("num_train_timesteps"),
        range=None if span is None else [span.start, span.stop],
        noise=find_noise_side(place),
        merged_by=recipe.get("method"),
        mergeable=mergeable,
        note=note,
    )


def find_other_input(config: Mapping[str, Any], latents: Any) -> str:
    """Say how a denoiser does more than x_t -> x_t, empty if it does not; it may learn a variance.

    Args:
        config: the denoiser's.
        latents: the channels that its VAE makes, None without one.
    """
    inputs, outputs = config.get("in_channels"), config.get("out_channels")
    if inputs is None:
        return ""
    if config.get("_class_name") in PACKED:
        inputs, outputs = inputs // 4, None if outputs is None else outputs // 4
    channels = outputs if latents is None else latents
    learns_variance = latents is None and channels == 2 * inputs
    if channels not in (None, inputs) and not learns_variance:
        kind = {9: "an inpainting model: x_t, a mask and a masked image", 8: "x_t and an image"}
        what = f"it takes {inputs} input channels ({kind.get(inputs, 'x_t and something else')})"
        owner = "its images have" if latents is None else "the latents of its VAE have"
        return f"{what}, {owner} {channels}"
    if outputs not in (None, inputs, 2 * inputs):
        return f"it takes {inputs} input channels and gives {outputs}"
    return ""


def _judge(checkpoint: Checkpoint, latents: Any) -> tuple[bool, str]:
    """Return whether a model merges, and a note."""
    config = checkpoint.config or {}
    model_class = config.get("_class_name")
    if checkpoint.parameters == 0:
        return False, "no floating point tensor"
    if checkpoint.place.files[0].name == PROJECTED:
        return False, "keeps the W of `finetune --projection paper`: sample and evaluate take it"
    if any(part in name for name in checkpoint for part in FACTORS):
        return True, "a LoRA: merges as an expert of the base that it was trained on"
    if checkpoint.place.pipeline is None:
        return True, "merges; analyze, finetune and sample need a whole pipeline folder"
    if model_class not in MODEL_CLASSES:
        return True, f"merges; analyze, finetune and sample do not know the class {model_class}"
    if other := find_other_input(config, latents):
        return True, f"merges; analyze, finetune and sample do not take it: {other}"
    return True, "merges with models of equal keys and shapes finetuned from one base"


def _read(path: Path | None, reader: Reader = read_json) -> dict[str, Any]:
    return reader(path) if path is not None and path.is_file() else {}


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
