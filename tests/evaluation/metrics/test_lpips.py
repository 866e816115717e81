from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from demerge.errors import InputError, UsageError
from demerge.evaluation.metrics.lpips import ASSET, LPIPS, diversity, load_lpips, make_asset


def distance(lpips: LPIPS, a: Tensor, b: Tensor) -> Tensor:
    """LPIPS [n] between images a and b, uint8 [n C H W], image by image."""
    return (lpips.embed(a) - lpips.embed(b)).square().sum(1)


def test_the_shipped_weights_are_float16_and_below_5_mb() -> None:
    assert ASSET.stat().st_size < 5_000_000
    assert {value.dtype for value in load_file(ASSET).values()} == {torch.float16}
    assert (ASSET.parent / "LICENSE.lpips").is_file()


def test_zero_for_equal_images_symmetric_and_free_of_its_batch(
    noise: Callable[..., Tensor],
) -> None:
    lpips, a, b = load_lpips(), noise(3, 3, 32), noise(3, 3, 32, seed=1)
    assert distance(lpips, a, a).abs().max() == 0
    torch.testing.assert_close(distance(lpips, a, b), distance(lpips, b, a))
    torch.testing.assert_close(distance(lpips, a[:1], b[:1]), distance(lpips, a, b)[:1])


def test_small_and_grey_images_are_enlarged(noise: Callable[..., Tensor]) -> None:
    lpips, small = load_lpips(), noise(2, 1, 8)
    assert lpips.embed(small).shape == lpips.embed(noise(2, 3, 64)).shape
    with pytest.raises(UsageError, match="uint8"):
        lpips.embed(small.float())


def test_diversity_is_the_mean_over_pairs(noise: Callable[..., Tensor]) -> None:
    lpips, images = load_lpips(), noise(5, 1, 16)
    pairs = [(i, j) for i in range(5) for j in range(i)]
    by_pairs = torch.cat(
        [distance(lpips, images[i : i + 1], images[j : j + 1]) for i, j in pairs]
    ).mean()
    assert diversity(lpips.embed(images)) == pytest.approx(float(by_pairs), rel=1e-5)
    with pytest.raises(UsageError, match="at least 2"):
        diversity(lpips.embed(images[:1]))


def test_other_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("none")
    with pytest.raises(InputError, match=r"x\.safetensors"):
        load_lpips(tmp_path / "x.safetensors")


@pytest.mark.parity
def test_golden_values(asset: Callable[[str], Path], tmp_path: Path) -> None:
    folder = asset("lpips")
    ref, p0, p1 = (
        torch.from_numpy(np.array(Image.open(folder / f"ex_{name}.png"))).permute(2, 0, 1)[None]
        for name in ("ref", "p0", "p1")
    )
    lpips = load_lpips()
    assert float(distance(lpips, ref, p0)) == pytest.approx(0.7219, abs=1e-3)
    assert float(distance(lpips, ref, p1)) == pytest.approx(0.1376, abs=1e-3)
    assert make_asset(folder, tmp_path / "again.safetensors").read_bytes() == ASSET.read_bytes()
