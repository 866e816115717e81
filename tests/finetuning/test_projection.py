"""The projection: nothing at the start, exact when folded, present at every site it claims."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from demerge.diffusion.model import Diffusion
from demerge.finetuning.projection import ChannelMix, attach, find_sites, fold


def _noisy(denoiser: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for module in denoiser.modules():
            if isinstance(module, ChannelMix):
                module.W.add_(0.1 * torch.randn_like(module.W))
    return denoiser


def test_identity_start_is_bit_exact(tiny: Path) -> None:
    plain = Diffusion.load(tiny).denoiser
    mixed = attach(copy.deepcopy(plain))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    assert torch.equal(plain(x, t).sample, mixed(x, t).sample)


def test_fold_is_exact_and_gives_a_stock_state_dict(tiny: Path) -> None:
    plain = Diffusion.load(tiny).denoiser
    mixed = _noisy(attach(copy.deepcopy(plain)))
    folded = fold(mixed, copy.deepcopy(plain))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        before, after = mixed(x, t).sample, folded(x, t).sample
    assert not torch.allclose(before, plain(x, t).sample, atol=1e-3)
    assert float((before - after).abs().max()) < 1e-5
    assert list(folded.state_dict()) == list(plain.state_dict())


def test_w_mixes_the_stored_output_of_a_resnet(tiny: Path) -> None:
    """W on conv2 and conv_shortcut together is W on their sum, the block's output."""
    plain = Diffusion.load(tiny).denoiser
    block = plain.down_blocks[1].resnets[0]
    assert block.conv_shortcut is not None
    W = torch.eye(16) + 0.1 * torch.randn(16, 16)
    mixed = attach(copy.deepcopy(plain)).down_blocks[1].resnets[0]
    with torch.no_grad():
        mixed.conv2.parametrizations["weight"][0].W.copy_(W)
    h, temb = torch.randn(2, 8, 4, 4), torch.randn(2, 32)
    expected = torch.einsum("ij,bjhw->bihw", W, block(h, temb))
    torch.testing.assert_close(mixed(h, temb), expected, rtol=1e-4, atol=1e-5)


def test_sites_cover_samplers_shortcuts_and_attention(tiny: Path, tiny_text: Path) -> None:
    for folder, at_least in ((tiny, 6), (tiny_text, 8)):
        denoiser = Diffusion.load(folder).denoiser
        found = list(find_sites(denoiser))
        maps = [id(m) for group in found for m in group]
        assert len(found) >= at_least
        assert len(set(maps)) == len(maps)
