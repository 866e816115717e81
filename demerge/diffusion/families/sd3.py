"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): rectified flow, two CLIP encoders and a T5.

The transformer takes the next-to-last hidden states of both CLIPs side by side, padded to the width
of T5's states and put before them, and the pooled text of both CLIPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from demerge.diffusion.components import component_folder
from demerge.diffusion.conditioning import Condition
from demerge.diffusion.families.family import Denoiser, Family, Text
from demerge.diffusion.families.text import CLIP_PROJECTED, T5, Encoder, load_encoder
from demerge.errors import InputError
from demerge.storage.safetensors_header import read_json

T5_LENGTH = 256


class SD3(Family):
    """SD3Transformer2DModel."""

    denoisers = {"SD3Transformer2DModel": diffusers.SD3Transformer2DModel}

    @staticmethod
    def load_text(folder: Path) -> Text | None:
        first = load_encoder(folder, "text_encoder", "tokenizer", CLIP_PROJECTED)
        second = load_encoder(folder, "text_encoder_2", "tokenizer_2", CLIP_PROJECTED)
        third = load_encoder(folder, "text_encoder_3", "tokenizer_3", T5, T5_LENGTH)
        if first is None or second is None:
            what = f"{folder}: SD 3 without both of its CLIP text encoders"
            raise InputError(what, fix="fetch the whole pipeline; its T5 may be left out")
        config = read_json(component_folder(folder, "transformer") / "config.json")
        return SD3Text(first, second, third, int(config["joint_attention_dim"]))

    def _call(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        prediction: Tensor = denoiser(hidden_states=x_t, timestep=t, **condition).sample
        return prediction


@dataclass(frozen=True, slots=True)
class SD3Text:
    """Two CLIPs and a T5; without the T5 its states are zeros of this width, as in diffusers."""

    first: Encoder
    second: Encoder
    third: Encoder | None
    width: int

    @property
    def modules(self) -> dict[str, nn.Module]:
        encoders = (self.first, self.second, self.third)
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return {n: e.model for n, e in zip(names, encoders, strict=True) if e is not None}

    def __call__(self, captions: Sequence[str]) -> Condition:
        clips = [e(captions, output_hidden_states=True)[0] for e in (self.first, self.second)]
        states = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        if self.third is None:
            others = states.new_zeros(len(states), T5_LENGTH, self.width)
        else:
            others = self.third(captions)[0][0]
        states = torch.cat([pad(states, (0, others.shape[-1] - states.shape[-1])), others], dim=1)
        pooled = torch.cat([clip.text_embeds for clip in clips], dim=-1)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}
