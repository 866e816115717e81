"""Buckets of aspect ratios: each image is trained at the size whose aspect is nearest to its own.

A bucket is the base at this size, with the images that belong to it: they are scaled and cropped to
the size, and what depends on it follows (noise, size conditions, a resolution-dependent shift). A
batch is of one bucket. In an epoch each bucket's images are permuted and cut into batches, and the
last batch is filled up from the beginning; then the batches of all buckets are permuted. Both are
functions of (seed, epoch), so that a run resumes to the bit.

The nearest bucket is that of `diffusers.training_utils.find_nearest_bucket`, as in diffusers'
scripts: the one with the least |h W - w H|, of image h x w and bucket H x W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.finetuning.options import FinetuneOptions, bucket_sizes
from demerge.randomness import permutation


@dataclass(frozen=True, slots=True)
class Bucket:
    """The base at one size of images, and the images of this size."""

    base: Diffusion
    data: ImageData

    def __str__(self) -> str:
        _, height, width = self.data.shape
        return f"{height}x{width} ({len(self.data):,})"


def make_buckets(base: Diffusion, data: ImageData, options: FinetuneOptions) -> tuple[Bucket, ...]:
    """Return the buckets that have images; one of all images if no buckets are wanted.

    Raises:
        UsageError: if the sizes of the images are not known, or a size does not suit the base.
    """
    if options.aspect_ratio_buckets is None:
        return (Bucket(base, data),)
    from diffusers.training_utils import find_nearest_bucket

    sizes, own = bucket_sizes(options.aspect_ratio_buckets), data.sizes()
    if own is None:
        what = f"--aspect-ratio-buckets: the sizes of the images of {data.name} are not known"
        raise UsageError(what, fix="give a folder of images")
    chosen = [find_nearest_bucket(height, width, sizes) for height, width in own]
    buckets = []
    for number, (height, width) in enumerate(sizes):
        indices = [i for i, bucket in enumerate(chosen) if bucket == number]
        if indices:
            images = data.subset(indices).at((data.shape[0], height, width))
            buckets.append(Bucket(_base_at(base, height, width), images))
    return tuple(buckets)


def _base_at(base: Diffusion, height: int, width: int) -> Diffusion:
    """Return the base for images of a size, with the same modules."""
    family = base.family
    for side in (height, width):
        family.check_side(side, f"a side of --aspect-ratio-buckets {height},{width}")
    return replace(base, _family=type(family)(family.config, family.vae, (height, width)))


@torch.no_grad()
def check_buckets(buckets: Sequence[Bucket]) -> None:
    """Run the denoiser once at each size.

    Raises:
        InputError: if it cannot be run at one.
    """
    for bucket in buckets if len(buckets) > 1 else ():
        base = bucket.base
        x = torch.zeros(1, *base.sample_shape, device=base.device)
        dtype = next(base.denoiser.parameters()).dtype
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            base.predict(x, 0, base.condition(1, [""], [0]))


@lru_cache(maxsize=4)
def batches_of_epoch(
    counts: tuple[int, ...], size: int, seed: int, epoch: int
) -> list[tuple[int, list[int]]]:
    """Return the batches of an epoch: the number of the bucket, and `size` of its images.

    Args:
        counts: the number of images of each bucket.
    """
    batches = []
    for bucket, count in enumerate(counts):
        order = permutation(count, seed, "order of bucket", bucket, epoch)
        for start in range(0, count, size):
            batches.append((bucket, [order[(start + i) % count] for i in range(size)]))
    return [batches[i] for i in permutation(len(batches), seed, "order of batches", epoch)]
