"""A weight in scaled fp8 as a tensor of its true values, which are made when they are used.

W = codes * s,   s [] or one for each output [m], in float32
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demerge.storage.lazy import Unread

TINY = 2.0**-60


class Scaled(Unread):
    """Codes [*] and their scale as a float32 tensor [*]; a span of it flattened stays codes."""

    codes: Tensor
    scale: Tensor
    _row: int  # elements to a scale
    _start: int  # of the first code, in the whole tensor

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor) -> Scaled:
        """Return the values of contiguous codes [m ...] whose scale has one element, or m."""
        row = max(1, codes.numel() // max(1, scale.numel()))
        return cls._at(codes, scale.reshape(-1).float(), row, 0)

    @classmethod
    def _at(cls, codes: Tensor, scale: Tensor, row: int, start: int) -> Scaled:
        made = torch.empty(codes.shape, dtype=torch.float32, device="meta").as_subclass(cls)
        made.codes, made.scale, made._row, made._start = codes, scale, row, start
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the codes lie; the values are made there."""
        return self.codes.device

    def values(self) -> Tensor:
        """Return the values [*], made anew."""
        return self.times(decoded(self.codes.reshape(-1)), 0).view(self.codes.shape)

    def grown(self, k: Tensor) -> Scaled:
        """Return the same codes with scales of 2^k s, one k for each scale, for larger values."""
        scale = torch.where(k > 0, self._nonzero, self.scale) * 2.0**k
        return self._at(self.codes, scale, self._row, self._start)

    def times(self, chunk: Tensor, start: int) -> Tensor:
        """Multiply a chunk [n], from `start` of this tensor flattened on, with its scales."""
        return chunk * self._spread(self.scale, start, len(chunk))

    def over(self, chunk: Tensor, start: int) -> Tensor:
        """Divide a chunk [n] by its scales: codes that are not yet rounded."""
        return chunk / self._spread(self._nonzero, start, len(chunk))

    def largest(self, chunk: Tensor, start: int) -> Tensor:
        """Return the largest |chunk| for each scale, 0 if no element of the chunk has it."""
        largest = chunk.new_zeros(len(self.scale))
        rows = self._spread(torch.arange(len(self.scale)), start, len(chunk)).expand(len(chunk))
        return largest.scatter_reduce_(0, rows, chunk.abs(), "amax")

    @property
    def _nonzero(self) -> Tensor:
        """The scales, with one that is nearly 0 in place of 0."""
        return torch.where(self.scale == 0, TINY, self.scale)

    def _spread(self, of_scale: Tensor, start: int, n: int) -> Tensor:
        """Return for each element [n] from `start` on its scale's value; [1] for one scale."""
        if len(of_scale) == 1:
            return of_scale
        start += self._start
        first, last = start // self._row, -(-(start + n) // self._row)
        return of_scale[first:last].repeat_interleave(self._row)[start - first * self._row :][:n]

    def flat(self) -> Scaled:
        """See `Unread`."""
        return self._at(self.codes.reshape(-1), self.scale, self._row, self._start)

    def span(self, start: int, stop: int) -> Scaled:
        """See `Unread`."""
        return self._at(self.codes[start:stop], self.scale, self._row, self._start + start)


def decoded(codes: Tensor) -> Tensor:
    """Return the float32 values [n] of codes [n] in float8, by a table: faster than torch."""
    if codes.device.type != "cpu":
        return codes.float()
    indices = codes.view(torch.uint8).numpy()
    return torch.from_numpy(np.take(_table(codes.dtype), indices, mode="clip"))


@cache
def _table(dtype: torch.dtype) -> NDArray[np.float32]:
    values: NDArray[np.float32] = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    return values
