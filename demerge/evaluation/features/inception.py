"""Inception-v3 as FID defines it: the TensorFlow port of 2015-12-05, up to its last average pool.

    image [3 H W] -> resize to 299 x 299 in [-1, 1] -> stem -> 11 mixed blocks -> mean [2048]

The whole network is the table below. A block is a list of branches that read the same input and are
concatenated. A branch is a chain of steps. A step is one convolution, a fork `a|b` of two that are
concatenated, or a pool. Kernels and channels are those of the weights. `/2` is a step of stride 2
without padding, `/v` one of stride 1 without padding. Every other step keeps the size of its input.

Every convolution is followed by batch normalization, which is folded into it (in float64), and
ReLU: w' = w g / sqrt(v + eps), b' = b - m g / sqrt(v + eps). Tensors are channels-last, which is
faster on a CPU.

Differs from torchvision's Inception-v3, as the port does: average pools leave the padding out of
their mean, and the last block pools by the maximum.

Papers: Inception-v3 (arXiv 1512.00567), FID (arXiv 1706.08500), the resize matters (clean-fid,
arXiv 2104.11222).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from demerge.errors import InputError, UsageError
from demerge.evaluation.options import Preprocess
from demerge.reporting.images import check_uint8
from demerge.storage.pickles import unpickled

DIM = 2048
SIZE = 299
BATCH_NORM_EPS = 1e-3
PICKLES = (".pth", ".pt")
# The hashes of pytorch-fid's file, and of the same net without fc.
PTH_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SAFETENSORS_SHA256 = "aa5258d3cf03ee0a86d89c7ea3e991b547f1609a914383b7c33c7227f93155ba"
SOURCES = (
    "download pt_inception-2015-12-05-6726825d.pth from the release fid_weights of"
    f" mseitzer/pytorch-fid on GitHub (95,628,359 bytes, sha256 {PTH_SHA256})"
    " and give --features inception:FILE; or give the same tensors without fc as safetensors"
    f" (sha256 {SAFETENSORS_SHA256})"
)

STEM = "Conv2d_1a_3x3/2 Conv2d_2a_3x3/v Conv2d_2b_3x3 max/2 Conv2d_3b_1x1 Conv2d_4a_3x3/v max/2"
A = (
    "branch1x1, branch5x5_1 branch5x5_2,"
    " branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3, avg branch_pool"
)
B = "branch3x3/2, branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2, max/2"
C = (
    "branch1x1, branch7x7_1 branch7x7_2 branch7x7_3,"
    " branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5, avg branch_pool"
)
D = "branch3x3_1 branch3x3_2/2, branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2, max/2"
E = (
    "branch1x1, branch3x3_1 branch3x3_2a|branch3x3_2b,"
    " branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a|branch3x3dbl_3b, "
)
BLOCKS: Mapping[str, str] = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), A),
    "Mixed_6a": B,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), C),
    "Mixed_7a": D,
    "Mixed_7b": E + "avg branch_pool",
    "Mixed_7c": E + "max branch_pool",
}


class Conv(nn.Module):
    """A convolution with folded batch normalization and ReLU; `same` keeps the input size."""

    def __init__(self, weight: Tensor, bias: Tensor, *, stride: int = 1, same: bool = True) -> None:
        super().__init__()
        weight = weight.contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.stride = stride
        self.padding = (weight.shape[2] // 2, weight.shape[3] // 2) if same else (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B C H W] to [B C' H' W']."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding).relu_()


def pool(kind: str, stride: int) -> nn.Module:
    """Return a 3 x 3 pool, `avg` without padding in the mean; with stride 2 there is no padding."""
    if kind == "max":
        return nn.MaxPool2d(3, stride, int(stride == 1))
    return nn.AvgPool2d(3, stride, int(stride == 1), count_include_pad=False)


class Block(nn.Module):
    """Branches or convolutions that read one input, concatenated."""

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B C H W] to [B C' H' W']."""
        return torch.cat([branch(x) for branch in self.branches], 1)


class Inception(nn.Module):
    """Inception-v3 up to its last pool: resized images [B 3 299 299] -> features [B 2048].

    `weights` are tensors under pytorch-fid's names (`Mixed_5b.branch1x1.conv.weight` ...).
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.stem = _chain(weights, STEM, "")
        self.blocks = nn.Sequential()
        for name, text in BLOCKS.items():
            self.blocks.append(Block(_chain(weights, b, f"{name}.") for b in text.split(", ")))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B 3 299 299] in [-1, 1] to [B 2048]."""
        features: Tensor = self.blocks(self.stem(x.contiguous(memory_format=torch.channels_last)))
        return features.mean((2, 3))


def _chain(weights: Mapping[str, Tensor], text: str, prefix: str) -> nn.Sequential:
    return nn.Sequential(*(_step(weights, step, prefix) for step in text.split()))


def _step(weights: Mapping[str, Tensor], text: str, prefix: str) -> nn.Module:
    names, _, mode = text.partition("/")
    stride = 2 if mode == "2" else 1
    if names in ("avg", "max"):
        return pool(names, stride)
    folded = [_folded(weights, prefix + name) for name in names.split("|")]
    convolutions = [Conv(*tensors, stride=stride, same=not mode) for tensors in folded]
    return convolutions[0] if len(convolutions) == 1 else Block(convolutions)


def _folded(weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    weight = weights[f"{name}.conv.weight"].double()
    parts = ("weight", "bias", "running_mean", "running_var")
    gain, shift, mean, variance = (weights[f"{name}.bn.{part}"].double() for part in parts)
    scale = gain / (variance + BATCH_NORM_EPS).sqrt()
    return (weight * scale[:, None, None, None]).float(), (shift - mean * scale).float()


def load_inception(path: str | Path) -> Inception:
    """Read the weights and build the network.

    Args:
        path: a safetensors file with pytorch-fid's names, or pytorch-fid's own `.pth`, read by
            torch's restricted unpickler. The last layer `fc` is not needed.

    Raises:
        InputError: if the file is missing or damaged, or holds other tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no Inception weights there", fix=SOURCES)
    try:
        weights = unpickled(path) if path.suffix in PICKLES else load_file(path)
        network = Inception(weights).eval()
        with torch.inference_mode():
            dim = network(torch.zeros(1, 3, 75, 75)).shape[1]
    except (OSError, SafetensorError, KeyError, RuntimeError, IndexError) as error:
        reason = f"tensor {error} is missing" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: not Inception-v3's weights: {reason}", fix=SOURCES) from error
    if dim != DIM:
        raise InputError(f"{path}: {dim} features instead of {DIM}", fix=SOURCES)
    return network


def preprocess(images: Tensor, mode: str = "clean") -> Tensor:
    """Turn images uint8 [B C H W], C = 1 or 3, into the network's input, float32 [B 3 299 299].

    clean            bicubic (a = -0.5) with antialias, clamped to [0, 255]; (x - 128) / 128.
                     That of clean-fid.
    pytorch-fid      bilinear, half-pixel centres; 2 x / 255 - 1. That of pytorch-fid and DeMe.
    torch-fidelity   bilinear, corners at 0 as in TensorFlow 1; (x - 128) / 128. That of
                     torch-fidelity and the graph of 2015.
    """
    check_uint8(images)
    x, size = images.expand(-1, 3, -1, -1).float(), (SIZE, SIZE)
    if mode == "clean":
        resized = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
        return (resized.clamp(0, 255) - 128) / 128
    if mode == "pytorch-fid":
        return F.interpolate(x / 255, size, mode="bilinear", align_corners=False) * 2 - 1
    if mode == "torch-fidelity":
        rows, columns = (_bilinear_tf1(n, x.device) for n in x.shape[2:])
        return (rows @ x @ columns.T - 128) / 128
    fix = f"use one of {', '.join(get_args(Preprocess))}"
    raise UsageError(f"preprocess mode '{mode}' is unknown", fix=fix)


def _bilinear_tf1(n: int, device: torch.device) -> Tensor:
    """Return the matrix [299 n] of one axis; output i reads i n / 299, clamped at the far end."""
    position = torch.arange(SIZE, dtype=torch.float64) * n / SIZE
    low = position.floor().long()
    share = (position - low).float()
    matrix = torch.zeros(SIZE, n)
    matrix[torch.arange(SIZE), low] += 1 - share
    matrix[torch.arange(SIZE), (low + 1).clamp(max=n - 1)] += share
    return matrix.to(device)
