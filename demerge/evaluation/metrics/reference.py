"""The real side of a comparison, and the distances of images to it.

A reference holds the features of real images, or, read from an npz of another program, their moments alone; then the
distances that need single features (KID, precision, recall, density, coverage) are left out.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from demerge.data import load_images
from demerge.errors import ComparisonError, InputError
from demerge.evaluation.features.nets import FeatureNet, Progress
from demerge.evaluation.metrics.fid import (
    Moments,
    frechet_distance,
    load_moments,
    moments,
    square_root,
)
from demerge.evaluation.metrics.kid import kid
from demerge.evaluation.metrics.prdc import NEAREST, prdc, radii
from demerge.reporting.html import printable
from demerge.storage.atomic import commit_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Moments of real images under one feature net, and their features [n D] where these are known."""

    moments: Moments
    name: str
    fingerprint: str
    root: Tensor = field(repr=False)
    features: Tensor | None = field(default=None, repr=False)
    reach: Tensor | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        """Name the real images."""
        return f"Reference({self.n:,} images of {self.name})"

    @classmethod
    def from_images(
        cls,
        net: FeatureNet,
        images: Tensor,
        *,
        name: str = "images",
        progress: Progress | None = None,
    ) -> Reference:
        """Take the features of real images, uint8 [n C H W]; `name` says which data set and split they are."""
        return cls._of_features(
            net(images, progress=progress), net.protocol, name, images_sha256(images)
        )

    @classmethod
    def _of_features(
        cls, features: Tensor, protocol: Mapping[str, str], name: str, fingerprint: str
    ) -> Reference:
        value = moments([features], protocol)
        reach = radii(features, NEAREST) if len(features) > NEAREST else None
        return cls(value, name, fingerprint, square_root(value.covariance), features, reach)

    @classmethod
    def remembered(
        cls,
        path: Path,
        net: FeatureNet,
        images: Tensor,
        *,
        name: str,
        progress: Progress | None = None,
    ) -> Reference:
        """Do as `from_images`, but keep the features in a safetensors file and take them from there the next time."""
        wanted = {**net.protocol, "images": images_sha256(images)}
        if path.is_file():
            kept, facts = _read_features(path)
            if facts == wanted and len(kept) == len(images):
                return cls._of_features(kept, net.protocol, name, wanted["images"])
        features = net(images, progress=progress)
        commit_bytes(path, save({"features": features}, metadata=wanted))
        return cls._of_features(features, net.protocol, name, wanted["images"])

    @classmethod
    def from_npz(
        cls, path: Path, net: FeatureNet, *, n: int | None = None, progress: Progress | None = None
    ) -> Reference:
        """Read moments `mu` and `sigma` that demerge, pytorch-fid, EDM or ADM wrote, or images `arr_0` as ADM writes them.

        Args:
            net: the feature net of the comparison. A file that does not say what made its moments is taken at its word.
            n: how many images the moments stand for, if the file does not say so.

        Raises:
            InputError: if the file is damaged or holds neither, or its features are not of the net's number.
            ComparisonError: if the file says that it was made by another net or preprocessing.
        """
        keys = _keys(path)
        if "mu" not in keys and {"arr_0", "images"} & set(keys):
            images = load_images(path, limit=n)
            return cls.from_images(
                net, images.images(range(len(images))), name=printable(path.name), progress=progress
            )
        value = load_moments(path, n=n)
        _check_same_net(value.protocol, net)
        if value.dim != net.dim:
            what = f"{path}: moments of {value.dim} features, and {net.name} has {net.dim}"
            raise InputError(
                what, fix="give --features inception:FILE for statistics of 2048 features"
            )
        digest = hashlib.sha256(value.mean.numpy().tobytes() + value.covariance.numpy().tobytes())
        name = (
            printable(path.name)
            if value.protocol
            else f"{printable(path.name)} (it does not say by which net and preprocessing)"
        )
        return cls(value, name, digest.hexdigest(), square_root(value.covariance))

    @property
    def n(self) -> int:
        """The number of real images."""
        return self.moments.n


def evaluate_images(
    images: Tensor, reference: Reference, net: FeatureNet, *, progress: Progress | None = None
) -> dict[str, float]:
    """Return the distances of images, uint8 [n C H W], to a reference: `fd` always, the others where its features are known.

    Raises:
        ComparisonError: where the reference was made with another feature net.
    """
    _check_same_net(reference.moments.protocol, net)
    features = net(images, progress=progress)
    result = {"fd": frechet_distance(reference.moments, moments([features]), root=reference.root)}
    if reference.features is not None:
        result["kid"] = kid(reference.features, features).value
    if reference.features is not None and reference.reach is not None and len(features) > NEAREST:
        result |= asdict(prdc(reference.features, features, reach=reference.reach))
    return result


def _check_same_net(protocol: Mapping[str, str], net: FeatureNet) -> None:
    for key, value in protocol.items():
        if net.protocol.get(key, value) != value:
            raise ComparisonError(
                f"the reference was made with {key} '{value}', the images with '{net.protocol[key]}'",
                fix="make the reference again with this feature net",
            )


def _keys(path: Path) -> list[str]:
    """Return the names of an npz's arrays, none if it is damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            return [name.removesuffix(".npy") for name in file.namelist()]
    except (OSError, zipfile.BadZipFile):
        return []


def _read_features(path: Path) -> tuple[Tensor, dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("features"), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be read as safetensors: {error}", fix="remove it; it is made again"
        ) from error


def images_sha256(images: Tensor) -> str:
    """Return the SHA-256 of the shape and bytes of images, uint8 [n C H W]."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
