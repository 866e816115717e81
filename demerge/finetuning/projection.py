"""Channel-wise projection P(F) = W F, W [C C], the identity at the start, kept foldable.

DeMe (arXiv 2410.06664, Eq. 7) puts W behind every block and keeps it at inference. Behind a linear
map whose output is stored as it is, W is the linear map W K, W b itself. So we train W as a
reparametrisation of those maps,

    K' = W K,   b' = W b,                     K [C ...], b [C],

and folding writes K' and b' down: the expert is a stock state dict, exact, at no cost, and every
merge method applies. Differs from the paper in place (only where folding is exact) and in that
nothing is left at inference.

Sites: the convolutions of down- and upsamplers; conv2 with conv_shortcut of a resnet block, one W
for both, since their sum is what is stored; attention `to_out`; feed-forward out; `proj_out`.
W = I leaves every output bit-identical.

`--projection paper` is the paper's own: `demerge.diffusion.projection`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from demerge.diffusion.model import Diffusion
from demerge.diffusion.projection import check_has_blocks, has_projection
from demerge.errors import UsageError
from demerge.finetuning.options import FinetuneOptions

SITES = re.compile(
    r"(downsamplers\.\d+\.conv|upsamplers\.\d+\.conv|to_out\.0|ff\.net\.2|proj_out|conv_shortcut)$"
)


def check_projection(base: Diffusion, options: FinetuneOptions) -> None:
    """Check that the projection of the options can be put into the base.

    Raises:
        UsageError: if the paper's needs another denoiser, or the base has it and keeps it.
    """
    if options.projection == "paper":
        check_has_blocks(base.denoiser)
    elif has_projection(base.denoiser):
        what = f"{base.folder} keeps the W of `--projection paper`, so its experts do too"
        raise UsageError(what, fix="give --projection paper, or another base")


class ChannelMix(nn.Module):
    """W [C C], applied to the leading axis of a weight [C *] or a bias [C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.eye(channels))

    def forward(self, K: Tensor) -> Tensor:
        """Return W K, in the shape of K."""
        return (self.W @ K.reshape(K.shape[0], -1)).view_as(K)


def find_sites(denoiser: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield the linear maps that share one W, for each W."""
    for name, module in denoiser.named_modules():
        if SITES.search(name) and isinstance(module, nn.Linear | nn.Conv2d):
            if name.endswith("conv_shortcut"):
                yield [module, denoiser.get_submodule(name.removesuffix("conv_shortcut") + "conv2")]
            else:
                yield [module]


def attach(denoiser: nn.Module, frozen: Collection[nn.Module] = ()) -> nn.Module:
    """Put a W = I behind every site without a frozen map, in place."""
    for maps in list(find_sites(denoiser)):
        if any(linear in frozen for linear in maps):
            continue
        K: Any = maps[0].weight
        mix = ChannelMix(K.shape[0]).to(K)
        for linear in maps:
            parametrize.register_parametrization(linear, "weight", mix)
            if linear.bias is not None:
                parametrize.register_parametrization(linear, "bias", mix)
    return denoiser


@torch.no_grad()
def fold(mixed: nn.Module, stock: nn.Module) -> nn.Module:
    """Copy the weights of `mixed`, with K' = W K and b' = W b, into `stock`, which has no such W.

    Returns:
        stock, changed in place.
    """
    for name, module in stock.named_modules():
        source = mixed.get_submodule(name)
        for key, parameter in module.named_parameters(recurse=False):
            parameter.copy_(getattr(source, key))
        for key, buffer in module.named_buffers(recurse=False):
            buffer.copy_(getattr(source, key))
    return stock
