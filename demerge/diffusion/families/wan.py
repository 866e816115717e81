"""Wan 2.1 and 2.2 (arXiv 2503.20314): flow matching on the latents of videos, text by a UMT5.

x_t is [B C F H W]. An image is a video of one frame: that is what demerge trains on and draws. Wan
2.2 has two denoisers, `transformer` for t >= boundary_ratio T and `transformer_2` below: a routed
ensemble (`demerge.diffusion.routing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn

from demerge.diffusion.conditioning import Condition
from demerge.diffusion.families.family import Family, Text
from demerge.diffusion.families.text import T5, Encoder, load_encoder

TEXT_LENGTH = 512
SIDE = 480


class Wan(Family):
    """WanTransformer3DModel of the text-to-video pipelines."""

    denoisers = {"WanTransformer3DModel": diffusers.WanTransformer3DModel}
    autoencoders = {"AutoencoderKLWan": diffusers.AutoencoderKLWan}

    @staticmethod
    def load_text(folder: Path) -> Text | None:
        encoder = load_encoder(folder, "text_encoder", "tokenizer", T5, TEXT_LENGTH)
        return None if encoder is None else WanText(encoder)

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config.z_dim)

    @property
    def factor(self) -> int:
        return int(self.vae.config.scale_factor_spatial)

    @property
    def patch(self) -> int:
        return int(self.config.patch_size[-1])

    @property
    def own_size(self) -> tuple[int, int]:
        side = SIDE // self.factor
        return side, side

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.channels, 1, *self.size

    def encode(self, images: Tensor) -> Tensor:
        z = self.vae.encode(images[:, :, None]).latent_dist.mode()
        mean, deviation = self._statistics(z)
        x0: Tensor = (z - mean) / deviation
        return x0

    def decode(self, x0: Tensor) -> Tensor:
        mean, deviation = self._statistics(x0)
        video: Tensor = self.vae.decode(x0 * deviation + mean).sample
        return video[:, :, 0]

    def _statistics(self, like: Tensor) -> list[Tensor]:
        config = self.vae.config
        values = (config.latents_mean, config.latents_std)
        return [torch.tensor(value).view(1, -1, 1, 1, 1).to(like) for value in values]


@dataclass(frozen=True, slots=True)
class WanText:
    """The states of a UMT5; those of padding are 0."""

    encoder: Encoder

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.encoder.model}

    def __call__(self, captions: Sequence[str]) -> Condition:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        output, mask = self.encoder([prompt_clean(text) for text in captions], masked=True)
        return {"encoder_hidden_states": output.last_hidden_state * mask[..., None]}
