"""Feature nets: what turns images into the vectors that sets of images are compared by.

    images uint8 [B C H W] -> to_input -> network -> features float32 [B D]

A net is named in every protocol by its name, the SHA-256 of its weights and its preprocessing.
`FID` is printed for Inception-v3 with the known weights alone. Every other Frechet distance is
printed as `FD[name]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from demerge.errors import NumericalError, UsageError
from demerge.evaluation.features import digits, inception, random_net
from demerge.evaluation.options import Precision, Preprocess
from demerge.progress import Progress, silent
from demerge.storage.atomic import sha256

FID_WEIGHTS = frozenset({inception.PTH_SHA256, inception.SAFETENSORS_SHA256})


@dataclass(frozen=True, slots=True, eq=False)
class FeatureNet:
    """A network with its preprocessing and the facts that name it in a protocol."""

    name: str
    sha256: str
    dim: int
    preprocess: str
    network: Callable[[Tensor], Tensor]
    to_input: Callable[[Tensor], Tensor]
    device: torch.device
    batch_size: int

    def __repr__(self) -> str:
        return f"FeatureNet({self.name}, {self.dim} features, preprocess {self.preprocess})"

    @property
    def distance_name(self) -> str:
        """`FID` for Inception with the known weights, else `FD[name]`."""
        if self.sha256 not in FID_WEIGHTS:
            return f"FD[{self.name}]"
        return "FID(bf16)" if self.preprocess.endswith("bf16") else "FID"

    @property
    def protocol(self) -> dict[str, str]:
        """The fields that name this net in a protocol."""
        names = {"features": self.name, "features_sha256": self.sha256}
        return names | {"preprocess": self.preprocess}

    @property
    def home(self) -> torch.device:
        """Where features stay: on the net's device, if it has float64 for the sums over them."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    @torch.inference_mode()
    def __call__(self, images: Tensor, *, progress: Progress = silent) -> Tensor:
        """Return the features [n D] float32, at `home`, of images uint8 [n C H W]."""
        if len(images) == 0:
            raise UsageError("there is no image to take features of", fix="give at least one")
        rows = torch.empty(len(images), self.dim, device=self.home)
        for start in range(0, len(images), self.batch_size):
            batch = self.to_input(images[start : start + self.batch_size].to(self.device))
            # With TF32, GPUs would score differently from CPUs.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                rows[start : start + len(batch)] = self.network(batch).float()
            progress(start + len(batch), len(images), self.name)
        if not bool(rows.isfinite().all()):
            what = f"{self.name}: a feature is not finite"
            raise NumericalError(what, fix="check the images and the weights")
        return rows


def make_feature_net(
    spec: str,
    *,
    preprocess: Preprocess = "clean",
    mixed_precision: Precision = "no",
    device: str = "cpu",
) -> FeatureNet:
    """Return the net that `digits-cnn`, `random` or `inception:PATH` names.

    Args:
        preprocess: Inception's resize.
        mixed_precision: `bf16` runs Inception in bfloat16, twice as fast on a CPU that has it. It
            moves FID by some 0.4 % (33.48 to 33.36 on 1,500 against 1,500 images of CIFAR-10) and
            mixes with float32 features at an error of 0.25. So it is part of the protocol and is
            printed as `FID(bf16)`.
    """
    name, _, path = spec.partition(":")
    place = torch.device(device)
    if name == "digits-cnn" and not path:
        digest, classifier = sha256(digits.ASSET), digits.load_digits_cnn().to(place)
        network, to_input = classifier.features, digits.preprocess
        return FeatureNet(name, digest, digits.DIM, "grey 8x8", network, to_input, place, 256)
    if name == "random" and not path:
        net, to_input = random_net.RandomNet().to(place), random_net.preprocess
        dim, resize = random_net.DIM, "bilinear 32x32"
        return FeatureNet(name, net.sha256, dim, resize, net, to_input, place, 128)
    if name == "inception" and path:
        return _make_inception(Path(path).expanduser(), preprocess, mixed_precision, place)
    if name == "inception":
        raise UsageError("the feature net 'inception' needs its weights", fix=inception.SOURCES)
    fix = "use --features digits-cnn, random or inception:PATH"
    raise UsageError(f"feature net '{spec}' is unknown", fix=fix)


def _make_inception(
    path: Path, preprocess: Preprocess, mixed_precision: Precision, device: torch.device
) -> FeatureNet:
    net = inception.load_inception(path).to(device)
    network: Callable[[Tensor], Tensor] = net
    resize: str = preprocess
    if mixed_precision == "bf16":
        network, resize = partial(_in_bfloat16, net, device.type), f"{preprocess}, bf16"
    to_input = partial(inception.preprocess, mode=preprocess)
    batch_size = 16 if device.type == "cpu" else 128
    digest, dim = sha256(path), inception.DIM
    return FeatureNet("inception", digest, dim, resize, network, to_input, device, batch_size)


def _in_bfloat16(net: nn.Module, device_type: str, x: Tensor) -> Tensor:
    with torch.autocast(device_type, dtype=torch.bfloat16):
        features: Tensor = net(x)
    return features
