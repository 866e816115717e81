"""Count sketch of gradients: k numbers in place of D, whose inner products stay.

    h(x)_j = sum_{p = j mod k} sigma(p) x_p,     E <h(x), h(y)> = <x, y>,    SD <= sqrt(2/k) |x| |y|

A layer has a shorter sketch of its own, of its coordinates alone: k = 509, or all if it has fewer.

k is prime, so that no stride of a layer's shape falls into one bucket again and again. The buckets
of k coordinates in a row are all different: the sketch is a sum of rows of k signed coordinates,
without scattered writes, the same in every run. It is linear: sketches add up over pieces of a
gradient, over microbatches and over processes.

The sign sigma(p) is the top bit of a counter hash of p and the seed (the finaliser of SplitMix64),
not a draw of a torch generator, whose stream differs between devices. It is stored as one byte per
coordinate. p counts the coordinates of the parameters one after another.

Papers: Charikar, Chen, Farach-Colton: Finding frequent items in data streams (ICALP 2002);
SplitMix64: Steele, Lea, Flood (OOPSLA 2014).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from demerge.conflict import K, layer_widths, layers_of
from demerge.diffusion.numerics import accumulator
from demerge.randomness import key_of

ROWS = 8  # of k at a time: they stay in a processor's cache
ACCELERATED_ROWS = 512  # they are worth the start of a kernel
HASHED = 1 << 20
WORD = 1 << 64


@dataclass(frozen=True, slots=True, eq=False)
class CountSketch:
    """The map h from D coordinates to `width` numbers, k; `signs` [D] int8 is sigma."""

    signs: Tensor
    width: int = K

    @classmethod
    def of(
        cls, D: int, seed: int, *, k: int = K, device: torch.device | str = "cpu"
    ) -> CountSketch:
        """Make the sketch of D coordinates for a seed; it keeps all if they are fewer than k."""
        starts = range(0, D, HASHED)
        pieces = [signs(start, min(start + HASHED, D), seed, device) for start in starts]
        return cls(torch.cat(pieces), min(k, D))

    def layers(self, layout: Mapping[str, int]) -> Sketches:
        """Return the sketch of each layer of a layout, with the same signs."""
        parts, start = [], 0
        for size, width in zip(layers_of(layout).values(), layer_widths(layout), strict=True):
            parts.append((start, CountSketch(self.signs[start : start + size], width)))
            start += size
        return Sketches(parts)

    def add(self, total: Tensor, start: int, x: Tensor) -> None:
        """Add the sketch of the coordinates [start, start + n), x [n], to `total` [k] in place."""
        rows = ROWS if x.device.type == "cpu" else ACCELERATED_ROWS
        for a, b in _spans(start, start + len(x), self.width, rows):
            signed = x[a - start : b - start].float() * self.signs[a:b]
            bucket = a % self.width
            if bucket or b - a < self.width:
                total[bucket : bucket + b - a] += signed
            else:
                total += signed.view(-1, self.width).sum(0)

    def __call__(self, x: Tensor) -> Tensor:
        """Return h(x) [k] in float32 of a whole gradient x [D]."""
        total = accumulator((self.width,), self.signs.device)
        self.add(total, 0, x)
        return total.float()


@dataclass(frozen=True, slots=True, eq=False)
class Sketches:
    """Several sketches of one gradient, side by side; `parts`: first coordinate and sketch."""

    parts: Sequence[tuple[int, CountSketch]]

    @property
    def width(self) -> int:
        """How many numbers all of them have, W."""
        return sum(sketch.width for _, sketch in self.parts)

    def add(self, total: Tensor, start: int, x: Tensor) -> None:
        """Add the sketches of coordinates [start, start + n), x [n], to `total` [W] in place."""
        column = 0
        for first, sketch in self.parts:
            a, b = max(first, start), min(first + len(sketch.signs), start + len(x))
            if a < b:
                own = total[column : column + sketch.width]
                sketch.add(own, a - first, x[a - start : b - start])
            column += sketch.width


def _spans(start: int, stop: int, k: int, most: int) -> Iterator[tuple[int, int]]:
    """Split [start, stop) into the head of a row, blocks of up to `most` whole rows, and a tail."""
    while start < stop:
        rows = 0 if start % k else min((stop - start) // k, most)
        end = start + rows * k if rows else min(stop, start - start % k + k)
        yield start, end
        start = end


def signs(start: int, stop: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return sigma(p) in {-1, 1} for p in [start, stop), int8.

    Integers wrap around at 2^64 on every device. A shift moves the sign bit along, which the masks
    remove again. The last step of SplitMix64, z ^ z >> 31, does not change the top bit.
    """
    key = _signed(key_of(seed, "analysis-sketch") % WORD)
    z = torch.arange(start + 1, stop + 1, device=device) * _signed(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        shifted = (z >> shift) & ((1 << (64 - shift)) - 1)
        z = (z ^ shifted) * _signed(factor)
    return 1 - 2 * (z < 0).to(torch.int8)


def _signed(word: int) -> int:
    """Return the signed integer of the same 64 bits."""
    return word - WORD if word >= WORD // 2 else word
