"""Stock diffusers pipelines on disk: where one lies, and its parts, loaded by stock classes from an allow-list.

No remote code ever runs, no weight is filled in at random, and no scheduler is replaced by a default: a part that is missing or
foreign is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from demerge.conditions import keep_labels
from demerge.errors import InputError, UsageError
from demerge.local import local
from demerge.places import COMPONENTS

DENOISERS: Mapping[str, type[diffusers.ModelMixin]] = {
    "UNet2DModel": diffusers.UNet2DModel,
    "UNet2DConditionModel": diffusers.UNet2DConditionModel,
    "DiTTransformer2DModel": diffusers.DiTTransformer2DModel,
    "Transformer2DModel": diffusers.DiTTransformer2DModel,  # its name in older files, as those of facebook/DiT-XL-2-256
}


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A tokenizer and a CLIP text model, frozen."""

    tokenizer: Any
    model: nn.Module

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Encode B captions into their last hidden states [B L D]."""
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        states: Tensor = self.model(tokens.input_ids.to(next(self.model.parameters()).device))[0]
        return states


def resolve(model: str | Path) -> Path:
    """Return the pipeline folder of a path, an embedded model or a Hub id; a component folder stands for its pipeline.

    Raises:
        InputError: where there is no such folder, or no pipeline in it.
    """
    path = local(model)
    for folder in (path, path.parent):
        if (folder / "model_index.json").is_file() and (folder == path or (path / "config.json").is_file()):
            return folder
    what = "no model_index.json there, so no scheduler is known" if path.exists() else "no such folder"
    raise InputError(f"{model}: {what}", fix="name a pipeline folder (model_index.json, scheduler/, unet/ or transformer/)")


def part(folder: Path, name: str) -> Path:
    """Return the folder of a component; older pipelines of one model keep it in the pipeline's own."""
    return folder / name if (folder / name).is_dir() else folder


def _class_name(folder: Path, index: Mapping[str, Any], part: str) -> str:
    entry = index.get(part)
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        raise InputError(
            f"{folder}/model_index.json: no component '{part}'", fix="use a pipeline with scheduler, and unet or transformer"
        )
    return entry[1]


def denoiser_part(index: Mapping[str, Any]) -> str:
    """Return the name of the denoiser's component in a pipeline's index, `unet` where there is none."""
    return next((name for name in COMPONENTS if name in index), "unet")


def load_denoiser(folder: Path, index: Mapping[str, Any]) -> diffusers.ModelMixin:
    """Load the denoiser in float32.

    Raises:
        InputError: where its class is not supported, or the weights do not fit the config.
    """
    component = denoiser_part(index)
    name = _class_name(folder, index, component)
    if name not in DENOISERS:
        raise InputError(f"{folder}: denoiser class '{name}' is not supported", fix=f"use one of {', '.join(DENOISERS)}")
    try:
        model, report = DENOISERS[name].from_pretrained(
            part(folder, component), use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise InputError(f"{folder}/{component}: cannot be loaded: {error}", fix="check config.json and the weights") from error
    problems = {key: sorted(report[key])[:5] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]}
    if problems:
        raise InputError(f"{folder}/{component}: the weights do not fit the config: {problems}", fix="use the matching weights")
    denoiser: diffusers.ModelMixin = model
    keep_labels(denoiser)
    return denoiser


def load_scheduler(folder: Path, index: Mapping[str, Any]) -> Any:
    """Load the base's own scheduler.

    Raises:
        InputError: where it is missing or no scheduler of diffusers.
    """
    name = _class_name(folder, index, "scheduler")
    kind: Any = getattr(diffusers, name, None)
    if diffusers.SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise InputError(f"{folder}: scheduler class '{name}' is unknown to diffusers", fix="use a stock scheduler")
    try:
        return kind.from_pretrained(part(folder, "scheduler"))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder}/scheduler: cannot be loaded: {error}", fix="check scheduler_config.json") from error


def load_text(folder: Path) -> TextEncoder:
    """Load the tokenizer and the text encoder.

    Raises:
        UsageError: where transformers is not installed.
    """
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise UsageError("the base takes text, which needs transformers", fix="pip install 'demerge[sd]'") from error
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return TextEncoder(tokenizer, CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32))
