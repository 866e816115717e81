"""The Frechet distance between two sets of features, seen as Gaussians.

    d^2 = |mu_1 - mu_2|^2 + tr(S_1) + tr(S_2) - 2 tr((S_1 S_2)^(1/2))

The trace of the root is computed from symmetric matrices alone: with R = S_1^(1/2) (by eigh), tr((S_1 S_2)^(1/2)) is the sum
of the roots of the eigenvalues of R S_2 R. Moments are summed in float64 (float32 costs 8e-4 of the distance), around the
first batch's mean, so that no large numbers cancel.

With no more samples than features (n <= d) the covariance is singular and the distance far too large; such numbers are
marked `rank-deficient` wherever they are shown, and compare with nothing but numbers of the same n.

Paper: FID (arXiv 1706.08500). Differs from the reference code, which takes `sqrtm` of the unsymmetric S_1 S_2, drops an
imaginary part and adds 1e-6 to the diagonal where that fails: the eigenvalues here are never complex.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demerge.errors import InputError, NumericalError, UsageError
from demerge.storage.atomic import commit_file

PREFIX = "protocol_"  # of the keys that say what made the features
MAX_BYTES = 1 << 30
ASYMMETRY = 1e-5
NPZ = "give an npz with mu [D] and sigma [D D], written by pytorch-fid, EDM, ADM or demerge"


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Mean [D] and unbiased covariance [D D] of n features, float64, with what made them (`protocol`).

    Raises:
        UsageError: where the shapes do not fit or n < 2.
        NumericalError: where a number is not finite.
    """

    mean: Tensor
    covariance: Tensor
    n: int
    protocol: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        d = self.mean.numel()
        if self.mean.shape != (d,) or self.covariance.shape != (d, d):
            raise UsageError(
                f"mean {list(self.mean.shape)} and covariance {list(self.covariance.shape)} do not fit",
                fix="give mu [D] and sigma [D D] of the same features",
            )
        if self.n < 2:
            raise UsageError(
                f"a covariance of {self.n} samples is not defined", fix="use at least 2 images"
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise NumericalError(
                "the moments hold NaN or Inf", fix="check the images and the feature net"
            )

    def __repr__(self) -> str:
        """Say how many features of how many images."""
        return f"Moments({self.dim} features of {self.n:,} images)"

    @property
    def dim(self) -> int:
        """D, the number of features."""
        return self.mean.numel()

    @property
    def rank_deficient(self) -> bool:
        """Whether n <= D, so that the covariance is singular."""
        return self.n <= self.dim


def moments(batches: Iterable[Tensor], protocol: Mapping[str, str] | None = None) -> Moments:
    """Sum the moments of features given in batches [B D], holding one batch at a time.

    Raises:
        UsageError: where there are fewer than 2 features.
    """
    n, origin, total, outer = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for batch in batches:
        x = batch.detach().to("cpu", torch.float64)
        origin = origin if n else x.mean(0)
        x = x - origin
        n += len(x)
        total = total + x.sum(0)
        outer = outer + x.T @ x
    if n < 2:
        raise UsageError(f"a covariance of {n} samples is not defined", fix="use at least 2 images")
    shift = total / n
    covariance = (outer - n * torch.outer(shift, shift)) / (n - 1)
    return Moments(origin + shift, (covariance + covariance.T) / 2, n, dict(protocol or {}))


def square_root(covariance: Tensor) -> Tensor:
    """Return the symmetric root R [D D] of a covariance [D D], R R = S; eigenvalues below zero are rounding, taken as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def frechet_distance(a: Moments, b: Moments, *, root: Tensor | None = None) -> float:
    """Return the squared Frechet distance of two Gaussians, >= 0 and symmetric up to rounding.

    `root` is the root of a's covariance, where it is known already: it costs more than all the rest.

    Raises:
        UsageError: where the features differ in number.
    """
    if a.dim != b.dim:
        raise UsageError(
            f"features of {a.dim} and {b.dim} dimensions do not compare",
            fix="use one feature net for both",
        )
    if torch.equal(a.mean, b.mean) and torch.equal(a.covariance, b.covariance):
        return 0.0
    root = square_root(a.covariance) if root is None else root
    overlap = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (
        (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    )
    return max(0.0, float(distance))


def save_moments(path: Path, value: Moments) -> Path:
    """Write `mu`, `sigma`, `n` and the protocol's fields into an npz that pytorch-fid and edm read."""
    arrays: dict[str, Any] = {
        "mu": value.mean.numpy(),
        "sigma": value.covariance.numpy(),
        "n": np.asarray(value.n),
    }
    arrays |= {f"{PREFIX}{key}": np.asarray(text) for key, text in value.protocol.items()}
    return commit_file(path, lambda stream: np.savez(stream, **arrays))


def load_moments(path: Path, *, n: int | None = None) -> Moments:
    """Read an npz with `mu` [D] and `sigma` [D D], as demerge, pytorch-fid, EDM and ADM write them.

    Args:
        n: how many images the file stands for, if it does not say so itself.

    Raises:
        InputError: if the file is no such npz, `sigma` is no covariance, or n is not known. Pickled objects are never loaded.
    """
    arrays = _arrays(path)
    try:
        count = int(arrays["n"]) if "n" in arrays else n
        mean, covariance = (
            torch.from_numpy(np.array(arrays[key], dtype=np.float64)) for key in ("mu", "sigma")
        )
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path}: mu, sigma or n is not made of numbers: {error}", fix=NPZ
        ) from error
    if count is None:
        fix = "say it: --reference-images N, for example 50000 for the train split of CIFAR-10"
        raise InputError(f"{path}: the file does not say how many images it stands for", fix=fix)
    try:
        protocol = {
            key.removeprefix(PREFIX): str(text)
            for key, text in arrays.items()
            if key.startswith(PREFIX)
        }
        value = Moments(mean, covariance, count, protocol)
    except (UsageError, NumericalError) as error:
        raise InputError(f"{path}: {error.what}", fix=error.fix) from error
    scale = float(covariance.abs().max())
    if (
        bool((covariance.diagonal() < 0).any())
        or float((covariance - covariance.T).abs().max()) > ASYMMETRY * scale
    ):
        raise InputError(
            f"{path}: sigma is not symmetric with a diagonal >= 0, so it is not a covariance",
            fix=NPZ,
        )
    return value


def _arrays(path: Path) -> dict[str, Any]:
    """Read the arrays of an npz that are statistics; others, such as the images of ADM's files, are left alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {
                entry.filename.removesuffix(".npy"): entry.file_size for entry in archive.infolist()
            }
        if not {"mu", "sigma"} <= sizes.keys():
            raise ValueError(f"its arrays are {list(sizes)[:8]}")
        wanted = [key for key in sizes if key in ("mu", "sigma", "n") or key.startswith(PREFIX)]
        large = [key for key in wanted if sizes[key] > MAX_BYTES]
        if large:
            raise ValueError(f"{large[0]} takes {sizes[large[0]]:,} bytes")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in wanted}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(f"{path}: not an npz with mu and sigma: {error}", fix=NPZ) from error
