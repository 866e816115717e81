"""Exact order statistics of a stream: the k-th largest magnitude in a few passes, constant memory.

The bits of a magnitude, read as an integer, have the order of the magnitudes. A histogram of their
upper 16 bits finds the bucket of the k-th largest; the next pass counts the next 16 bits of the
values in that bucket, or collects the values if they are few (radix selection from the top). No
sorting, no sampling, no limit on the number of elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from demerge.merging.registry import Block, Blocks

DIGIT = 16
BUCKETS = 1 << DIGIT
FEW = 1 << 18  # values per row that are collected
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True, slots=True)
class _Bucket:
    """A row's value: in [low, low + 2^shift), the rank-th largest of count values there."""

    low: int
    shift: int
    rank: int
    count: int

    def narrow(self, counts: Tensor) -> _Bucket:
        """Return the bucket of the next digit, given how many values have each digit [65536]."""
        above = counts.flip(0).cumsum(0)  # how many values have this digit or a larger one
        position = int(torch.searchsorted(above, self.rank))
        digit, shift = len(counts) - 1 - position, self.shift - DIGIT
        left = self.rank - (int(above[position - 1]) if position else 0)
        return _Bucket(self.low + (digit << shift), shift, left, int(counts[digit]))

    def inside(self, bits: Tensor) -> Tensor:
        """Return those of the bits [n] that are in the bucket; numpy compares faster on the CPU."""
        high = self.low + (1 << self.shift) - 1
        if bits.device.type != "cpu":
            return bits[(bits >= self.low) & (bits <= high)].cpu()
        array = bits.numpy()
        return torch.from_numpy(array[np.flatnonzero((array >= self.low) & (array <= high))])


def share_of(density: float, n: int) -> int:
    """Return k = max(1, floor(density n)), how many of n entries a density keeps."""
    return max(1, math.floor(density * n))


def kth_magnitudes(blocks: Blocks, *, density: float) -> Tensor:
    """Return for each expert the k-th largest magnitude of its delta [K], exactly."""
    return kth(blocks, lambda block: block.deltas, lambda n: share_of(density, n))


def kth(blocks: Blocks, values: Callable[[Block], Tensor], rank: Callable[[int], int]) -> Tensor:
    """Return the rank(n)-th largest of the n magnitudes of each row of values(block) [R *], [R].

    Rows go on over all blocks. Equal magnitudes count one by one; a rank outside 1..n stands for
    the nearest.
    """
    dtype = values(next(iter(blocks))).dtype

    def bits(block: Block) -> Tensor:
        magnitudes = values(block).abs()
        return magnitudes.reshape(len(magnitudes), -1).view(INTEGERS[dtype])

    counts = blocks.total(lambda block: _upper_digits(bits(block)))
    n = int(counts[0].sum())
    first = _Bucket(0, torch.finfo(dtype).bits, min(max(1, rank(n)), n), n)
    buckets = [first.narrow(row) for row in counts]
    while buckets[0].shift and max(bucket.count for bucket in buckets) > FEW:
        lower = blocks.total(partial(_digits, bits, buckets))
        buckets = [bucket.narrow(row) for bucket, row in zip(buckets, lower, strict=True)]
    found = [bucket.low for bucket in buckets]
    if buckets[0].shift:
        found = _collect(blocks, bits, buckets)
    return torch.tensor(found, dtype=INTEGERS[dtype]).view(dtype)


def _upper_digits(bits: Tensor) -> Tensor:
    """Count the upper digits of magnitudes [R n], whose sign bit is 0: [R 32768]."""
    digits = bits >> (torch.iinfo(bits.dtype).bits - DIGIT)
    return torch.stack([torch.bincount(row, minlength=BUCKETS // 2) for row in digits]).cpu()


def _digits(bits: Callable[[Block], Tensor], buckets: list[_Bucket], block: Block) -> Tensor:
    """Count the next digits of the bits [R n] that are in their row's bucket: [R 65536]."""
    pairs = zip(bits(block), buckets, strict=True)
    rows = [(bucket.inside(row) - bucket.low) >> (bucket.shift - DIGIT) for row, bucket in pairs]
    return torch.stack([torch.bincount(row, minlength=BUCKETS) for row in rows])


def _collect(blocks: Blocks, bits: Callable[[Block], Tensor], buckets: list[_Bucket]) -> list[int]:
    """Return the value each row looks for, out of all that are in its bucket."""

    def inside(block: Block) -> list[np.ndarray]:
        rows = zip(buckets, bits(block), strict=True)
        return [bucket.inside(row).numpy() for bucket, row in rows]

    values = [np.empty(bucket.count, dtype=np.int64) for bucket in buckets]
    filled = [0] * len(buckets)
    for parts in blocks.map(inside):
        for row, part in enumerate(parts):
            values[row][filled[row] :][: len(part)] = part
            filled[row] += len(part)
    places = [bucket.count - bucket.rank for bucket in buckets]
    return [int(np.partition(row, place)[place]) for row, place in zip(values, places, strict=True)]


def magnitudes_at(blocks: Blocks, threshold: Tensor, rank: Callable[[int], int]) -> Tensor:
    """Return for each expert the index of the entry with which rank(n) are kept, [K] int64.

    Entries above the threshold [K] are kept, those equal to it in their order; -1 if the former
    suffice. The index is counted as `Block.start` is.
    """
    found = list(blocks.map(partial(_above_and_at, threshold)))
    n = sum(size for size, _, _ in found)
    last = []
    for row, bound in enumerate(threshold.tolist()):
        if bound == 0:
            last.append(-1)  # what is above it is all there is to keep
            continue
        room = min(rank(n), n) - sum(above[row] for _, above, _ in found)
        places = torch.cat([at[row] for _, _, at in found])
        last.append(int(places[room - 1]) if room > 0 else -1)
    return torch.tensor(last, device=threshold.device)


def _above_and_at(threshold: Tensor, block: Block) -> tuple[int, list[int], list[Tensor]]:
    above, at = [], []
    for delta, bound in zip(block.deltas, threshold, strict=True):
        row = delta.reshape(-1).abs()
        above.append(int((row > bound).count_nonzero()))
        is_at = row == bound if bound else row < 0
        at.append(is_at.nonzero().view(-1).cpu() + block.start)
    return block.base.numel(), above, at
