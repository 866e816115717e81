"""SDXL (arXiv 2307.01952): two CLIP encoders, and size, crop and target size of the image.

The UNet takes the next-to-last hidden states of both encoders side by side, the pooled text of the
second one, and (H, W, 0, 0, H, W): the size is always that of the image, the crop none. If the
pipeline says `force_zeros_for_empty_prompt`, an empty caption is zeros: in guidance, as stock
pipelines do, and where training drops captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from demerge.diffusion.conditioning import Condition
from demerge.diffusion.families.family import Denoiser, Family, Text
from demerge.diffusion.families.text import CLIP, CLIP_PROJECTED, Encoder, load_encoder
from demerge.errors import InputError
from demerge.storage.layout import read_index


class SDXL(Family):
    """UNet2DConditionModel with `addition_embed_type` text_time."""

    denoisers = {"UNet2DConditionModel": diffusers.UNet2DConditionModel}

    @staticmethod
    def takes(config: Mapping[str, Any]) -> bool:
        return config.get("addition_embed_type") == "text_time"

    @staticmethod
    def load_text(folder: Path) -> Text | None:
        first = load_encoder(folder, "text_encoder", "tokenizer", CLIP)
        second = load_encoder(folder, "text_encoder_2", "tokenizer_2", CLIP_PROJECTED)
        if first is None or second is None:
            what = f"{folder}: SDXL without both of its text encoders, as its refiner is"
            raise InputError(what, fix="use the base model of SDXL")
        zeros_for_none = bool(read_index(folder).get("force_zeros_for_empty_prompt"))
        return SDXLText(first, second, zeros_for_none)

    def _call(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        added = {name: condition[name] for name in ("text_embeds", "time_ids")}
        states = condition["encoder_hidden_states"]
        prediction: Tensor = denoiser(
            x_t, t, encoder_hidden_states=states, added_cond_kwargs=added
        ).sample
        return prediction

    def extra(self, like: Tensor) -> Condition:
        _, height, width = self.image_shape
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=like.dtype)
        return {"time_ids": ids.to(like.device).expand(len(like), -1)}


@dataclass(frozen=True, slots=True)
class SDXLText:
    """Both encoders; `zeros_for_none` is whether an empty caption is zeros."""

    first: Encoder
    second: Encoder
    zeros_for_none: bool

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.first.model, "text_encoder_2": self.second.model}

    def __call__(self, captions: Sequence[str]) -> Condition:
        one, _ = self.first(captions, output_hidden_states=True)
        two, _ = self.second(captions, output_hidden_states=True)
        states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        condition = {"encoder_hidden_states": states, "text_embeds": two.text_embeds}
        if self.zeros_for_none:
            for i, caption in enumerate(captions):
                if not caption:
                    for tensor in condition.values():
                        tensor[i] = 0
        return condition
