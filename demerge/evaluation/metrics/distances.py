"""The real side of a comparison, and the distances of images to it.

A reference holds the features of real images. Read from an npz of another program it holds their
moments alone; then the distances that need single features (KID, precision, recall, density,
coverage) are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from demerge.data import load_images
from demerge.errors import ComparisonError, InputError
from demerge.evaluation.features.nets import FeatureNet
from demerge.evaluation.metrics.fid import (
    Moments,
    array_sizes,
    frechet_distance,
    load_moments,
    moments,
    square_root,
)
from demerge.evaluation.metrics.kid import kid
from demerge.evaluation.metrics.prdc import NEAREST, prdc, radii
from demerge.progress import Progress, silent
from demerge.reporting.html import printable
from demerge.storage.atomic import commit_bytes

UNKNOWN_NET = "it does not say by which net and preprocessing"


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Moments of real images under one feature net, and their features [n D] if these are known.

    All lie where the net leaves its features, for the comparison with any number of models.
    """

    moments: Moments
    name: str
    fingerprint: str
    root: Tensor = field(repr=False)
    features: Tensor | None = field(default=None, repr=False)
    reach: Tensor | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"Reference({self.n:,} images of {self.name})"

    @property
    def n(self) -> int:
        """The number of real images."""
        return self.moments.n

    @classmethod
    def from_images(
        cls,
        net: FeatureNet,
        images: Tensor,
        *,
        name: str = "images",
        cache: str | Path | None = None,
        progress: Progress = silent,
    ) -> Reference:
        """Take the features of real images, uint8 [n C H W].

        Args:
            name: data set and split of the images.
            cache: a safetensors file that keeps the features for the next time.
        """
        digest = hash_images(images)
        record = {**net.protocol, "images": digest}
        features = None if cache is None else _read_features(Path(cache), record)
        if features is None or len(features) != len(images):
            features = net(images, progress=progress)
            if cache is not None:
                commit_bytes(cache, save({"features": features.cpu()}, metadata=record))
        features = features.to(net.home)
        value = moments([features], net.protocol)
        reach = radii(features, NEAREST) if len(features) > NEAREST else None
        return cls(value, name, digest, square_root(value.covariance), features, reach)

    @classmethod
    def from_npz(
        cls, path: str | Path, net: FeatureNet, *, n: int | None = None, progress: Progress = silent
    ) -> Reference:
        """Read moments that demerge, pytorch-fid, EDM or ADM wrote, or images `arr_0` of ADM.

        Args:
            net: the feature net of the comparison. A file that does not say what made its moments
                is trusted.
            n: the number of images that the moments stand for, if the file does not say so.

        Raises:
            InputError: if the file is damaged or holds neither, or its features are not of the
                net's number.
            ComparisonError: if the file says that another net or preprocessing made it.
        """
        keys, name = array_sizes(path).keys(), printable(Path(path).name)
        if "mu" not in keys and {"arr_0", "images"} & keys:
            images = load_images(path, limit=n)
            pixels = images.images(range(len(images)))
            return cls.from_images(net, pixels, name=name, progress=progress)
        value = load_moments(path, n=n)
        _check_same_net(value.protocol, net)
        if value.dim != net.dim:
            what = f"{path}: moments of {value.dim} features, and {net.name} has {net.dim}"
            raise InputError(what, fix="give --features inception:FILE for 2048 features")
        digest = hashlib.sha256(value.mean.numpy().tobytes() + value.covariance.numpy().tobytes())
        name = name if value.protocol else f"{name} ({UNKNOWN_NET})"
        value = replace(
            value, mean=value.mean.to(net.home), covariance=value.covariance.to(net.home)
        )
        return cls(value, name, digest.hexdigest(), square_root(value.covariance))


def evaluate_images(
    images: Tensor, reference: Reference, net: FeatureNet, *, progress: Progress = silent
) -> dict[str, float]:
    """Return the distances of images, uint8 [n C H W], to a reference.

    `fd` always, the others if the features of the reference are known.
    """
    _check_same_net(reference.moments.protocol, net)
    features = net(images, progress=progress)
    distance = frechet_distance(reference.moments, moments([features]), root=reference.root)
    metrics = {"fd": distance}
    if reference.features is None:
        return metrics
    metrics["kid"] = kid(reference.features, features).value
    if reference.reach is not None and len(features) > NEAREST:
        metrics |= asdict(prdc(reference.features, features, reach=reference.reach))
    return metrics


def _check_same_net(protocol: Mapping[str, str], net: FeatureNet) -> None:
    for key, value in protocol.items():
        own = net.protocol.get(key, value)
        if own != value:
            what = f"the reference was made with {key} '{value}', the images with '{own}'"
            raise ComparisonError(what, fix="make the reference again with this feature net")


def _read_features(path: Path, record: Mapping[str, str]) -> Tensor | None:
    """Return the features in a file, None unless they are of this record."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            features: Tensor = file.get_tensor("features")
            return features if file.metadata() == record else None
    except (OSError, SafetensorError) as error:
        what = f"{path}: cannot be read as safetensors: {error}"
        raise InputError(what, fix="remove it; the next evaluation writes it again") from error


def hash_images(images: Tensor) -> str:
    """Return the SHA-256 of the shape and bytes of images, uint8 [n C H W]."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
