"""UNets on images or latents: without condition, by class, or by the states of one text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
from torch import nn

from demerge.diffusion.conditioning import Classes, Condition
from demerge.diffusion.families.family import Family, Text
from demerge.diffusion.families.taef2 import AutoencoderTAEF2
from demerge.diffusion.families.text import BERT, CLIP, Encoder, load_encoder
from demerge.errors import UsageError


class UNet(Family):
    """UNet2DModel; with `num_class_embeds` it takes a class."""

    denoisers = {"UNet2DModel": diffusers.UNet2DModel}

    def check(self) -> None:
        config = self.config
        count = config.get("num_class_embeds")
        is_mixed = config.get("cross_attention_dim") is not None and count is not None
        if config.get("addition_embed_type") or config.get("class_embed_type") or is_mixed:
            what = "the denoiser takes conditions besides text or a class"
            fix = "use an unconditional base, one with class labels, SD 1.x, 2.x or SDXL"
            raise UsageError(f"{what} (addition, class embeddings)", fix=fix)

    @property
    def classes(self) -> Classes | None:
        count = self.config.get("num_class_embeds")
        return None if count is None else Classes(int(count))


class StableDiffusion(UNet):
    """UNet2DConditionModel of Stable Diffusion 1.x and 2.x; a small one may have a BERT."""

    denoisers = {"UNet2DConditionModel": diffusers.UNet2DConditionModel}
    autoencoders = {
        "AutoencoderKL": diffusers.AutoencoderKL,
        "AutoencoderTiny": diffusers.AutoencoderTiny,
        "AutoencoderTAEF2": AutoencoderTAEF2,
    }

    @staticmethod
    def load_text(folder: Path) -> Text | None:
        encoder = load_encoder(folder, "text_encoder", "tokenizer", [*CLIP, *BERT])
        return None if encoder is None else LastStates(encoder)


@dataclass(frozen=True, slots=True)
class LastStates:
    """The last hidden states [B L D] of one encoder; padding is masked if its config says so."""

    encoder: Encoder

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.encoder.model}

    def __call__(self, captions: Sequence[str]) -> Condition:
        masked = bool(getattr(self.encoder.model.config, "use_attention_mask", False))
        output, _ = self.encoder(captions, masked=masked)
        return {"encoder_hidden_states": output[0]}
