"""The paper's channel-wise projection: W [C C] behind every block of a UNet, kept at inference.

    F <- W F = F + (W - I) F          F [B C H W], the hidden states that a block returns

DeMe (arXiv 2410.06664, Eq. 7). W is the identity at the start and is trained with the rest. The sum
is computed, so that W = I leaves F as it is to the bit, in every precision. What is taken from the
paper and its released code: one W for each down, mid and up block, without bias. The skips that a
down block also returns stay as they are. On Stable Diffusion 1.4 these are 9 W with 9.2 million
elements, 1.06 % of all parameters, which is the paper's number.

W cannot be folded into the stock weights: behind a block lie a sum, a norm or a concatenation. So
it is stored with the other weights, in one file of a name that no stock loader looks for
(`demerge.storage.layout.PROJECTED`). A stock loader fails on it, and never leaves W out.
`demerge.finetuning.projection` has the projection that can be folded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from demerge.errors import UsageError

FOLDABLE = "give --projection foldable, which is folded into stock weights"


class BlockProjection(nn.Module):
    """W [C C], applied to the channels of the hidden states [B C H W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.eye(channels))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return W F."""
        identity = torch.eye(len(self.W), dtype=self.W.dtype, device=self.W.device)
        return hidden + conv2d(hidden, (self.W - identity)[:, :, None, None])


def check_has_blocks(denoiser: nn.Module) -> None:
    """Check that a denoiser is a UNet, whose blocks can have a W each.

    Raises:
        UsageError: if not.
    """
    blocks = list(find_blocks(denoiser))
    if not blocks or not all(hasattr(block, "resnets") for block in blocks):
        what = f"--projection paper puts W behind the blocks of a UNet, not of a {_kind(denoiser)}"
        raise UsageError(what, fix=FOLDABLE)


def find_blocks(denoiser: nn.Module) -> Iterator[nn.Module]:
    """Yield the down, mid and up blocks of a UNet; none of another denoiser."""
    yield from getattr(denoiser, "down_blocks", ())
    if (middle := getattr(denoiser, "mid_block", None)) is not None:
        yield middle
    yield from getattr(denoiser, "up_blocks", ())


def has_projection(denoiser: nn.Module) -> bool:
    """Whether blocks of a denoiser have a W."""
    return any(isinstance(module, BlockProjection) for module in denoiser.modules())


def attach_to_blocks(denoiser: nn.Module) -> nn.Module:
    """Put a W = I behind every block that has none, in place; return the denoiser.

    Raises:
        UsageError: if the denoiser is not a UNet.
    """
    check_has_blocks(denoiser)
    for block in find_blocks(denoiser):
        if not hasattr(block, "projection"):
            resnets: Any = block.resnets
            like = next(block.parameters())
            block.projection = BlockProjection(resnets[-1].out_channels).to(like)
            block.register_forward_hook(_project)
    return denoiser


def _project(block: Any, _: tuple[Any, ...], output: Any) -> Any:
    """Apply W to the hidden states of a block; they come first if it also returns skips."""
    if isinstance(output, tuple):
        return block.projection(output[0]), *output[1:]
    return block.projection(output)


def _kind(denoiser: nn.Module) -> str:
    return type(denoiser).__name__
