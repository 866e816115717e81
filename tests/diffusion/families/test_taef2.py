"""TAEF2 is what its files say: names, shapes, formula, and images that come back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from demerge.diffusion.families.taef2 import AutoencoderTAEF2, PooledBlock
from demerge.diffusion.model import Diffusion
from demerge.errors import InputError

ROOT = Path(__file__).resolve().parents[3]


def test_the_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block, x = PooledBlock(8), torch.randn(2, 8, 6, 6)
    w = block.state_dict()
    pool = F.group_norm(F.conv2d(x, w["pool.0.weight"]), 4, w["pool.1.weight"], w["pool.1.bias"])
    h = x + F.conv2d(F.relu(pool), w["pool.3.weight"])
    inner = h
    for layer in (0, 2, 4):
        inner = F.conv2d(inner, w[f"conv.{layer}.weight"], w[f"conv.{layer}.bias"], padding=1)
        inner = F.relu(inner) if layer < 4 else inner
    torch.testing.assert_close(block(x), F.relu(inner + h))


def test_latents_are_bounded_only_in_the_decoder() -> None:
    torch.manual_seed(0)
    small = AutoencoderTAEF2(latent_channels=2, block_out_channels=(4, 4))
    z = torch.full((1, 2, 3, 3), 9.0)
    same = small.decoder[1:](3 * torch.tanh(z / 3)) * 2 - 1
    torch.testing.assert_close(small.decode(z).sample, same)
    images = torch.rand(1, 3, 6, 6) * 2 - 1
    mean, std = [0.5, -1.0], [2.0, 0.5]
    raw = small.encode(images).latents
    small.register_to_config(latents_mean=mean, latents_std=std)
    latents = small.encode(images).latents
    expected = (raw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(small(images).sample, small.decoder(raw) * 2 - 1)


def test_statistics_of_another_number_of_channels_are_refused(
    tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_family("taef2"), tmp_path / "copy")
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "latents_std": [1.0]}))
    with pytest.raises(InputError, match="latents_std must have 4 numbers"):
        Diffusion.load(folder)


@pytest.mark.parity
def test_real_images_come_back() -> None:
    """By the real weights; images of LPIPS, at 64 x 64, within 22 dB."""
    assets = Path(os.environ.get("DEMERGE_ASSETS") or ROOT.parent / "shared" / "assets")
    if not (assets / "taef2").is_dir():
        pytest.skip("taef2 is neither in ../shared/assets nor in $DEMERGE_ASSETS")
    autoencoder, state = AutoencoderTAEF2(), {}
    for part in ("encoder", "decoder"):
        weights = torch.load(assets / f"taef2/taef2_{part}.pth", weights_only=True)
        state.update({f"{part}.{name}": tensor.float() for name, tensor in weights.items()})
    autoencoder.load_state_dict(state)
    image = Image.open(assets / "lpips" / "ex_ref.png").convert("RGB")
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = autoencoder.encode(x).latents
        back = autoencoder.decode(latents).sample.clamp(-1, 1)
    assert latents.shape == (1, 32, 8, 8)
    assert -10 * torch.log10(((back - x) / 2).square().mean()) > 22
