"""DiT (arXiv 2212.09748): a transformer on latents, by class; it also learns a variance."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.models.embeddings import LabelEmbedding

from demerge.diffusion.conditioning import Classes
from demerge.diffusion.families.family import Family


class DiT(Family):
    """DiTTransformer2DModel, once called Transformer2DModel."""

    denoisers = {
        "DiTTransformer2DModel": diffusers.DiTTransformer2DModel,
        "Transformer2DModel": diffusers.DiTTransformer2DModel,  # in facebook/DiT-XL-2-256
    }

    @property
    def classes(self) -> Classes | None:
        count = int(self.config.num_embeds_ada_norm)
        return Classes(count, count)

    @staticmethod
    def prepare(denoiser: Any) -> None:
        """Stop it from dropping labels by itself, in place; its tensors stay."""
        for module in denoiser.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
