"""The Frechet distance between two sets of features, seen as Gaussians.

    d^2 = |mu_1 - mu_2|^2 + tr(S_1) + tr(S_2) - 2 tr((S_1 S_2)^(1/2))

The trace of the root is computed from symmetric matrices alone: with R = S_1^(1/2) (by eigh),
tr((S_1 S_2)^(1/2)) is the sum of the roots of the eigenvalues of R S_2 R. Moments are summed in
float64 (float32 costs 8e-4 of the distance), around the first batch's mean, so that no large
numbers cancel.

With no more samples than features (n <= d) the covariance is singular and the distance far too
large. Such numbers are marked `rank-deficient` and compare only with numbers of the same n.

Paper: FID (arXiv 1706.08500). Differs from the reference code, which takes `sqrtm` of the
unsymmetric S_1 S_2, drops an imaginary part and adds 1e-6 to the diagonal if that fails: the
eigenvalues here are never complex.
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
DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Mean [D] and unbiased covariance [D D] of n features, float64, and what made them."""

    mean: Tensor
    covariance: Tensor
    n: int
    protocol: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        d, shapes = self.mean.numel(), (self.mean.shape, self.covariance.shape)
        if shapes != ((d,), (d, d)):
            what = f"mean {list(shapes[0])} and covariance {list(shapes[1])} do not fit"
            raise UsageError(what, fix="give mu [D] and sigma [D D] of the same features")
        _check_count(self.n)
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            fix = "check the images and the feature net"
            raise NumericalError("the moments hold NaN or Inf", fix=fix)

    def __repr__(self) -> str:
        return f"Moments({self.dim} features of {self.n:,} images)"

    @property
    def dim(self) -> int:
        """D, the number of features."""
        return self.mean.numel()


def _check_count(n: int) -> None:
    if n < 2:
        fix = "use at least 2 images"
        raise UsageError(f"a covariance of {n} samples is not defined", fix=fix)


def moments(batches: Iterable[Tensor], protocol: Mapping[str, str] | None = None) -> Moments:
    """Sum the moments of features given in batches [B D], holding one batch at a time."""
    n, origin, total, outer = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for batch in batches:
        x = batch.detach().double()
        origin = origin if n else x.mean(0)
        x = x - origin
        n += len(x)
        total = total + x.sum(0)
        outer = outer + x.T @ x
    _check_count(n)
    shift = total / n
    covariance = (outer - n * torch.outer(shift, shift)) / (n - 1)
    return Moments(origin + shift, (covariance + covariance.T) / 2, n, dict(protocol or {}))


def square_root(covariance: Tensor) -> Tensor:
    """Return the root R [D D] of a covariance, R R = S; eigenvalues below zero are rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def frechet_distance(a: Moments, b: Moments, *, root: Tensor | None = None) -> float:
    """Return the squared Frechet distance of two Gaussians, >= 0 and symmetric up to rounding.

    Args:
        root: the root of a's covariance, if it is known: it costs more than all the rest.
    """
    if a.dim != b.dim:
        what = f"features of {a.dim} and {b.dim} dimensions do not compare"
        raise UsageError(what, fix="use one feature net for both")
    if torch.equal(a.mean, b.mean) and torch.equal(a.covariance, b.covariance):
        return 0.0
    root = square_root(a.covariance) if root is None else root
    overlap = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return max(0.0, float((a.mean - b.mean).square().sum() + traces - 2 * overlap))


def save_moments(path: str | Path, value: Moments) -> Path:
    """Write `mu`, `sigma`, `n` and the protocol as an npz that pytorch-fid and EDM read."""
    arrays: dict[str, Any] = {"mu": value.mean.numpy(force=True)}
    arrays["sigma"] = value.covariance.numpy(force=True)
    arrays["n"] = np.asarray(value.n)
    arrays |= {f"{PREFIX}{key}": np.asarray(text) for key, text in value.protocol.items()}
    return commit_file(Path(path), lambda stream: np.savez(stream, **arrays))


def load_moments(path: str | Path, *, n: int | None = None) -> Moments:
    """Read an npz with `mu` [D] and `sigma` [D D], as demerge, pytorch-fid, EDM and ADM write them.

    Pickled objects are never loaded.

    Args:
        n: the number of images that the file stands for, if it does not say so itself.

    Raises:
        InputError: if the file is not such an npz, `sigma` is not a covariance, or n is unknown.
    """
    arrays = _read_arrays(path)
    try:
        count = int(arrays["n"]) if "n" in arrays else n
        mean = torch.from_numpy(np.array(arrays["mu"], dtype=np.float64))
        covariance = torch.from_numpy(np.array(arrays["sigma"], dtype=np.float64))
    except (ValueError, TypeError) as error:
        what = f"{path}: mu, sigma or n is not made of numbers: {error}"
        raise InputError(what, fix=NPZ) from error
    if count is None:
        fix = "say it: --reference-images N, for example 50000 for the train split of CIFAR-10"
        raise InputError(f"{path}: the file does not say how many images it stands for", fix=fix)
    names = [key for key in arrays if key.startswith(PREFIX)]
    protocol = {key.removeprefix(PREFIX): str(arrays[key]) for key in names}
    try:
        value = Moments(mean, covariance, count, protocol)
    except (UsageError, NumericalError) as error:
        raise InputError(f"{path}: {error.what}", fix=error.fix) from error
    asymmetry = float((covariance - covariance.T).abs().max())
    is_symmetric = asymmetry <= ASYMMETRY * float(covariance.abs().max())
    if not is_symmetric or bool((covariance.diagonal() < 0).any()):
        what = f"{path}: sigma is not symmetric with a diagonal >= 0, so it is not a covariance"
        raise InputError(what, fix=NPZ)
    return value


def array_sizes(path: str | Path) -> dict[str, int]:
    """Return the names of an npz's arrays, and the bytes that each takes when it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {e.filename.removesuffix(".npy"): e.file_size for e in archive.infolist()}
    except DAMAGED as error:
        raise InputError(f"{path}: not an npz with mu and sigma: {error}", fix=NPZ) from error


def _read_arrays(path: str | Path) -> dict[str, Any]:
    """Read only the arrays of an npz that are statistics, not the images of ADM's files."""
    sizes = array_sizes(path)
    try:
        if not {"mu", "sigma"} <= sizes.keys():
            raise ValueError(f"its arrays are {list(sizes)[:8]}")
        wanted = [key for key in sizes if key in ("mu", "sigma", "n") or key.startswith(PREFIX)]
        if large := [key for key in wanted if sizes[key] > MAX_BYTES]:
            raise ValueError(f"{large[0]} takes {sizes[large[0]]:,} bytes")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in wanted}
    except DAMAGED as error:
        raise InputError(f"{path}: not an npz with mu and sigma: {error}", fix=NPZ) from error
