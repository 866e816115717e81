"""FLUX.1 (dev and schnell): rectified flow on latents in packs of 2 x 2, a CLIP and a T5.

    x_t [B C H W]  <->  tokens [B (H/2 W/2) (4 C)]     at t / T, with the position of each pack

Of the CLIP it takes the pooled text, of the T5 the hidden states. The dev model has the scale of
its guidance as an input. It is trained here with a scale of 1, which is no guidance; the images are
drawn with `--guidance-scale`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from einops import rearrange
from torch import Tensor, nn

from demerge.diffusion.conditioning import Condition
from demerge.diffusion.families.family import Denoiser, Family, Text
from demerge.diffusion.families.text import CLIP, T5, Encoder, load_encoder
from demerge.errors import InputError

T5_LENGTH = 512
PATCH = 2
PACK = "b c (h p) (w q) -> b (h w) (c p q)"
UNPACK = "b (h w) (c p q) -> b c (h p) (w q)"


class Flux(Family):
    """FluxTransformer2DModel."""

    denoisers = {"FluxTransformer2DModel": diffusers.FluxTransformer2DModel}

    @staticmethod
    def load_text(folder: Path) -> Text | None:
        clip = load_encoder(folder, "text_encoder", "tokenizer", CLIP)
        t5 = load_encoder(folder, "text_encoder_2", "tokenizer_2", T5, T5_LENGTH)
        if clip is None or t5 is None:
            what = f"{folder}: FLUX.1 without both of its text encoders"
            raise InputError(what, fix="fetch the whole pipeline")
        return FluxText(clip, t5)

    @property
    def is_distilled(self) -> bool:
        return bool(self.config.guidance_embeds)

    def extra(self, like: Tensor) -> Condition:
        return {"guidance": like.new_ones(len(like))} if self.is_distilled else {}

    def _call(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        height, width = (side // PATCH for side in x_t.shape[-2:])
        # made on the device, since a CUDA graph copies nothing from the host
        rows = torch.arange(height, device=x_t.device, dtype=x_t.dtype)
        columns = torch.arange(width, device=x_t.device, dtype=x_t.dtype)
        grid = torch.cartesian_prod(rows, columns)
        positions = torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)
        length = condition["encoder_hidden_states"].shape[1]
        packs: Tensor = denoiser(
            hidden_states=rearrange(x_t, PACK, p=PATCH, q=PATCH),
            timestep=t / 1000,
            txt_ids=positions.new_zeros(length, 3),
            img_ids=positions,
            **condition,
        ).sample
        return rearrange(packs, UNPACK, h=height, p=PATCH, q=PATCH)

    @property
    def channels(self) -> int:
        return int(self.config.in_channels) // PATCH**2

    @property
    def patch(self) -> int:
        return PATCH

    @property
    def own_size(self) -> tuple[int, int]:
        side = int(self.vae.config.sample_size) // self.factor
        return side, side

    def sigmas(self, steps: int) -> list[float] | None:
        levels: list[float] = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        return levels


@dataclass(frozen=True, slots=True)
class FluxText:
    """The pooled text of a CLIP, and the states of a T5."""

    clip: Encoder
    t5: Encoder

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.clip.model, "text_encoder_2": self.t5.model}

    def __call__(self, captions: Sequence[str]) -> Condition:
        pooled = self.clip(captions)[0].pooler_output
        return {"encoder_hidden_states": self.t5(captions)[0][0], "pooled_projections": pooled}
