"""The families of denoisers that demerge analyzes, finetunes and draws from; one file each.

To add one, write a subclass of `Family` and name it here; docs/extending.md shows how.
"""

from __future__ import annotations

from typing import Any

from demerge.diffusion.families.dit import DiT
from demerge.diffusion.families.family import Family, Text
from demerge.diffusion.families.flux import Flux
from demerge.diffusion.families.sd3 import SD3
from demerge.diffusion.families.sdxl import SDXL
from demerge.diffusion.families.unet import StableDiffusion, UNet
from demerge.diffusion.families.wan import Wan

FAMILIES: tuple[type[Family], ...] = (UNet, SDXL, StableDiffusion, DiT, SD3, Flux, Wan)
DENOISERS = {name: stock for family in FAMILIES for name, stock in family.denoisers.items()}

__all__ = ["DENOISERS", "FAMILIES", "Family", "Text", "family_of"]


def family_of(name: str, config: Any) -> type[Family]:
    """Return the family of a denoiser, by its class and config; `Family` for an unknown class."""
    chosen = (f for f in FAMILIES if name in f.denoisers and f.takes(config))
    return next(chosen, Family)
