from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from demerge.errors import InputError, UsageError
from demerge.evaluation.features.inception import (
    BATCH_NORM_EPS,
    BLOCKS,
    PTH_SHA256,
    STEM,
    Conv,
    load_inception,
    pool,
    preprocess,
)
from demerge.evaluation.features.inception import _folded as folded


def test_the_table_names_every_convolution_of_the_port() -> None:
    stem = [step.split("/")[0] for step in STEM.split() if not step.startswith("max")]
    mixed = [
        f"{block}.{name.split('/')[0]}"
        for block, text in BLOCKS.items()
        for branch in text.split(", ")
        for step in branch.split()
        for name in step.split("|")
        if step.split("/")[0] not in ("avg", "max")
    ]
    assert len(stem) == 5
    assert len(stem) + len(mixed) == len(set(stem + mixed)) == 94


def test_folding_equals_convolution_then_normalization() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5, eps=BATCH_NORM_EPS)
    x = torch.randn(2, 3, 9, 9)
    norm(conv(x))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.eval()
    weights = {
        "a.conv.weight": conv.weight,
        **{f"a.bn.{key}": value for key, value in norm.state_dict().items()},
    }
    torch.testing.assert_close(Conv(*folded(weights, "a"))(x), norm(conv(x)).relu())


def test_the_average_pool_leaves_the_padding_out() -> None:
    torch.testing.assert_close(pool("avg", 1)(torch.ones(1, 1, 5, 5)), torch.ones(1, 1, 5, 5))


def test_clean_is_the_bicubic_of_pillow() -> None:
    images = torch.randint(0, 256, (1, 3, 17, 20), dtype=torch.uint8)
    resized = [
        np.asarray(
            Image.fromarray(channel.numpy().astype(np.float32)).resize(
                (299, 299), Image.Resampling.BICUBIC
            )
        )
        for channel in images[0]
    ]
    expected = (np.stack(resized).clip(0, 255) - 128) / 128
    np.testing.assert_allclose(preprocess(images, "clean")[0].numpy(), expected, atol=1e-5)


def test_torch_fidelity_reads_positions_without_half_pixels() -> None:
    ramp = torch.arange(0, 250, 10, dtype=torch.uint8).view(1, 1, 1, 25).expand(1, 1, 25, 25)
    row = preprocess(ramp, "torch-fidelity")[0, 0, 0] * 128 + 128
    expected = (torch.arange(299) * 25 / 299 * 10).clamp(max=240)
    torch.testing.assert_close(row, expected, atol=1e-3, rtol=0)


def test_pytorch_fid_ranges_over_minus_one_to_one() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    black, white = preprocess(images, "pytorch-fid")
    torch.testing.assert_close(black, torch.full_like(black, -1))
    torch.testing.assert_close(white, torch.full_like(white, 1))


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)]
)
def test_other_images_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="uint8"):
        preprocess(images)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="bogus"):
        preprocess(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "bogus")  # type: ignore[arg-type]


def test_bad_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file(
        {"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "part.safetensors"
    )
    with pytest.raises(InputError, match=r"text\.safetensors"):
        load_inception(tmp_path / "text.safetensors")
    with pytest.raises(InputError, match=r"bn\.weight"):
        load_inception(tmp_path / "part.safetensors")
    with pytest.raises(InputError, match="absent") as missing:
        load_inception(tmp_path / "absent.safetensors")
    assert "release fid_weights" in missing.value.fix
    assert PTH_SHA256 in missing.value.fix


def test_the_pth_of_pytorch_fid_is_read_without_running_it(tmp_path: Path) -> None:
    part = {
        "Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3),
        "fc.weight": torch.zeros(1008, 2048),
    }
    torch.save(part, tmp_path / "part.pth")
    with pytest.raises(InputError, match=r"bn\.weight"):
        load_inception(tmp_path / "part.pth")
    canary = tmp_path / "canary"
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Touch(str(canary)), protocol=2))
    with pytest.raises(InputError, match=r"code\.pth"):
        load_inception(tmp_path / "code.pth")
    assert not canary.exists()


class Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_the_whole_net_as_pth_gives_the_same_features(
    asset: Callable[[str], Path], tmp_path: Path
) -> None:
    weights = asset("inception/pt_inception-2015-12-05.nofc.safetensors")
    batches = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}
    extra = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008), **batches}
    torch.save({**load_file(weights), **extra}, tmp_path / "net.pth")
    x = preprocess(torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8))
    with torch.inference_mode():
        assert torch.equal(load_inception(tmp_path / "net.pth")(x), load_inception(weights)(x))


def test_interpolation_is_not_torchs_default_bicubic() -> None:
    images = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8)
    plain = F.interpolate(images.float(), (299, 299), mode="bicubic")
    assert (preprocess(images) * 128 + 128 - plain.clamp(0, 255)).abs().max() > 1
