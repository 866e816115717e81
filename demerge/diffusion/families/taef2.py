"""TAEF2 (github.com/madebyollin/taesd): a tiny autoencoder of FLUX.2's latents, 32 channels.

    block(x)    h = x + pool(x);  relu(h + conv3(relu(conv3(relu(conv3(h))))))
    pool(x)     conv1(relu(groupnorm_4(conv1(x)))), 4 times as wide inside; in the deepest level
    encode      images [B 3 H W] in [-1, 1]  ->  (z - mean) / std   [B 32 H/8 W/8]
    decode      3 tanh(z / 3) before the first layer, as in the other models of the taesd series

diffusers' AutoencoderTiny has no `pool`. The names of the tensors are those of taesd's files,
behind `encoder.` and `decoder.`. A pipeline names this module in its model_index.json, and
diffusers loads it if demerge is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

LEVEL = 3  # blocks of a level
GROUPS = 4


class PooledBlock(AutoencoderTinyBlock):  # type: ignore[misc]
    """A block of taesd with a branch before it."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, "relu")
        inner = GROUPS * width
        self.pool = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.GroupNorm(GROUPS, inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [B C H W]."""
        output: Tensor = super().forward(x + self.pool(x))
        return output


class Clamp(nn.Module):
    """3 tanh(z / 3)."""

    def forward(self, z: Tensor) -> Tensor:
        """Return the latents, bounded by 3."""
        return 3 * torch.tanh(z / 3)


class AutoencoderTAEF2(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The autoencoder; all levels have the first of the widths.

    Args:
        latents_mean, latents_std: per channel, of what the encoder itself returns; latents have
            mean 0 and variance 1 if these are the data's. 0 and 1 by default.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 32,
        block_out_channels: Sequence[int] = (64, 64, 64, 64),
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        width, depth = block_out_channels[0], len(block_out_channels) - 1
        encoder: list[nn.Module] = [_conv(in_channels, width), _block(width, False)]
        decoder: list[nn.Module] = [Clamp(), _conv(latent_channels, width), nn.ReLU()]
        for level in range(depth):
            deepest = level == depth - 1
            encoder.append(_conv(width, width, stride=2, bias=False))
            encoder += [_block(width, deepest) for _ in range(LEVEL)]
            decoder += [_block(width, level == 0) for _ in range(LEVEL)]
            decoder += [nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]
        self.encoder = nn.Sequential(*encoder, _conv(width, latent_channels))
        self.decoder = nn.Sequential(*decoder, _block(width, False), _conv(width, out_channels))

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Return the latents of images in [-1, 1]."""
        mean, std = self._statistics(x)
        latents = (self.encoder((x + 1) / 2) - mean) / std
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(self, x: Tensor, generator: object = None, return_dict: bool = True) -> Any:
        """Return the images of latents, nominally in [-1, 1]; `generator` is not used."""
        mean, std = self._statistics(x)
        sample = self.decoder(x * std + mean) * 2 - 1
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> Any:
        """Return the images, encoded and decoded."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)

    def _statistics(self, like: Tensor) -> list[Tensor]:
        """Return mean and standard deviation [1 C 1 1] of the encoder's channels."""
        config, n = self.config, self.config.latent_channels
        values = (config.latents_mean or [0.0] * n, config.latents_std or [1.0] * n)
        return [torch.tensor(value).view(1, -1, 1, 1).to(like) for value in values]


def _conv(inside: int, outside: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=bias)


def _block(width: int, pooled: bool) -> nn.Module:
    return PooledBlock(width) if pooled else AutoencoderTinyBlock(width, width, "relu")
