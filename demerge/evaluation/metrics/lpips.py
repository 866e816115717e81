"""LPIPS: perceptual distance by features of AlexNet, v0.1, with float16 weights of the package.

    d(a, b) = sum_l 1/(H_l W_l) sum_hw sum_c w_lc (a_lchw - b_lchw)^2

a_l, b_l have unit length over channels. Since the heads w are nonnegative, d is a squared Euclidean
distance between embeddings e, whose elements are sqrt(w_lc / (H_l W_l)) a_lchw. So each image
passes the network once, and the mean over all pairs of n images needs no pairs:

    2 / (n (n-1)) sum_{i<j} |e_i - e_j|^2  =  2 / (n-1) sum_i |e_i - mean e|^2

The network wants some 64 pixels. Smaller images are enlarged (bilinear) until their shorter side
has 64, and every protocol says so. The file in the package is made from AlexNet's trunk and the
v0.1 heads by

    python -m demerge.evaluation.metrics.lpips FOLDER demerge/assets/alexnet_lpips_fp16.safetensors

Paper: LPIPS (arXiv 1801.03924). Licence of the heads: assets/LICENSE.lpips.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from demerge.errors import InputError, UsageError
from demerge.reporting.images import check_uint8
from demerge.storage.atomic import commit_bytes, sha256

ASSET = Path(__file__).resolve().parents[2] / "assets" / "alexnet_lpips_fp16.safetensors"
SHORTEST = 64
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
BATCH = 64
# (index in torchvision's AlexNet, stride, padding, has a 3 x 3 max pool of stride 2 before it)
LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))


class LPIPS(nn.Module):
    """AlexNet's five ReLU layers and heads; squared distances of its embeddings are LPIPS."""

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Mapping[str, Tensor], *, sha256: str = "") -> None:
        super().__init__()
        self.sha256 = sha256
        self.filters, self.biases = nn.ParameterList(), nn.ParameterList()
        self.heads = nn.ParameterList()
        for number, (index, *_) in enumerate(LAYERS):
            self.filters.append(_constant(weights[f"features.{index}.weight"]))
            self.biases.append(_constant(weights[f"features.{index}.bias"]))
            self.heads.append(_constant(weights[f"lin{number}.model.1.weight"]))
        if any(bool((head < 0).any()) for head in self.heads):
            raise InputError("an LPIPS head is negative", fix="use the v0.1 heads")
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))

    @property
    def protocol(self) -> str:
        """The text that names this measure in a protocol."""
        return f"lpips-alex v0.1, shorter side >= {SHORTEST} (bilinear), sha256 {self.sha256[:12]}"

    def forward(self, x: Tensor) -> Tensor:
        """Embed images [B 3 H W] in [-1, 1] as [B E]."""
        x, parts = (x - self.shift) / self.scale, []
        layers = zip(LAYERS, self.filters, self.biases, self.heads, strict=True)
        for (_, stride, padding, pool), weight, bias, head in layers:
            x = F.conv2d(F.max_pool2d(x, 3, 2) if pool else x, weight, bias, stride, padding).relu()
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            parts.append(rearrange(unit * (head / x[0, 0].numel()).sqrt(), "b c h w -> b (c h w)"))
        return torch.cat(parts, 1)

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Embed images uint8 [n C H W], C = 1 or 3, as [n E], batch by batch; mps: on the CPU."""
        check_uint8(images)
        factor, parts = SHORTEST / min(images.shape[2:]), []
        for batch in images.split(BATCH):
            x = batch.to(self.shift.device).float().expand(-1, 3, -1, -1) / 127.5 - 1
            if factor > 1:
                size = [round(side * factor) for side in x.shape[2:]]
                x = F.interpolate(x, size, mode="bilinear", align_corners=False)
            embedding = self(x)
            parts.append(embedding.cpu() if x.device.type == "mps" else embedding)
        return torch.cat(parts)


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.float(), requires_grad=False)


def load_lpips(path: str | Path = ASSET, *, device: str = "cpu") -> LPIPS:
    """Load the weights that ship in the package, or those in `path`."""
    try:
        return LPIPS(load_file(path), sha256=sha256(Path(path))).eval().to(device)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        what = f"{path}: not the LPIPS weights: {error}"
        raise InputError(what, fix="install demerge again") from error


def diversity(embedded: Tensor) -> float:
    """Return the mean LPIPS over all pairs of images given by their embeddings [n E]."""
    n = len(embedded)
    if n < 2:
        raise UsageError(f"diversity of {n} images is not defined", fix="give at least 2")
    spread = embedded.double() - embedded.double().mean(0)
    return float(2 / (n - 1) * spread.square().sum())


def make_asset(source: str | Path, target: str | Path) -> Path:
    """Join trunk and heads in the folder `source`, cast to float16, into one file."""
    tensors = load_file(Path(source) / "alexnet_features.safetensors")
    tensors |= load_file(Path(source) / "alex_heads_v0.1.safetensors")
    tensors = {key: value.half().contiguous() for key, value in tensors.items()}
    licences = "licence BSD-2-Clause (heads), BSD-3-Clause (trunk)"
    facts = {"made_by": f"python -m demerge.evaluation.metrics.lpips; {licences}"}
    return commit_bytes(Path(target), save(tensors, metadata=facts))


if __name__ == "__main__":
    sys.stdout.write(f"{make_asset(sys.argv[1], sys.argv[2])}\n")
