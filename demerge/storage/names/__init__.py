"""The names of modules in diffusers and in the original code of a family of models.

Each family is a file with one table. `original` is the layout of single files, of ComfyUI and of
most trainers; diffusers has names of its own, and splits some matrices of the original:

    double_blocks.0.img_attn.qkv [3d d]  =  transformer_blocks.0.attn.to_q, to_k, to_v [d d] each

The rows of the original are those of diffusers' modules, one after the other. A name may be dotted,
or flat with underscores for its dots, as kohya writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from demerge.storage.names.family import Family, Span, flat
from demerge.storage.names.flux import FLUX
from demerge.storage.names.sd3 import SD3
from demerge.storage.names.unet import UNet
from demerge.storage.names.wan import WAN

__all__ = ["NO_FAMILY", "Family", "Span", "find_family", "flat"]

# what names begin with, all of a row; transformer_blocks alone may be of Flux or of SD3
MARKS: tuple[tuple[Family, tuple[str, ...]], ...] = (
    (FLUX, (r"(?:single_transformer_blocks|double_blocks|single_blocks)[._]\d",)),
    (SD3, (r"joint_blocks[._]\d",)),
    (SD3, (r"transformer_blocks[._]\d", r"pos_embed[._]proj", "context_embedder")),
    (WAN, (r"blocks[._]\d+[._](?:attn1|attn2|self_attn|cross_attn|ffn)[._]",)),
)
NO_FAMILY = Family("unknown", {})


def find_family(names: Iterable[str]) -> Family:
    """Return the family that modules without prefixes are of; one without names if unknown."""
    names = list(names)
    for family, marks in MARKS:
        if all(any(re.match(mark, name) for name in names) for mark in marks):
            return family
    unet = UNet.of(names)
    return unet if unet.is_known else NO_FAMILY
