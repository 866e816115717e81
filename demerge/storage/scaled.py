"""A weight in scaled fp8 as a tensor of its true values, which are made when they are used.

W = codes * s,   s [] or one for each output [m], in float32
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TINY = 2.0**-60
FLAT = (Tensor.reshape, Tensor.view)
SHAPED: tuple[Any, ...] = (
    Tensor.shape, Tensor.dtype, Tensor.ndim, Tensor.nbytes, Tensor.itemsize, Tensor.layout,
    Tensor.requires_grad, Tensor.size, Tensor.numel, Tensor.dim, Tensor.element_size,
    Tensor.is_floating_point, Tensor.is_contiguous, Tensor.__len__,
)  # fmt: skip


class Scaled(Tensor):
    """Codes [*] and their scale as a float32 tensor [*] on the CPU; treat it as read-only.

    Its shape and dtype cost nothing, and a span of it flattened stays codes. Everything else is
    done on the values.
    """

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

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Answer shape and dtype, keep codes in spans, and make the values for all else."""
        kwargs = kwargs or {}
        if getattr(function, "__self__", function) in SHAPED:
            parent: Any = super()
            return parent.__torch_function__(function, types, args, kwargs)
        first = args[0] if args else None
        if isinstance(first, Scaled) and not kwargs:
            if function is Tensor.detach:
                return first
            if function in FLAT and args[1:] == (-1,):
                return cls._at(first.codes.reshape(-1), first.scale, first._row, first._start)
            is_item = function is Tensor.__getitem__ and first.ndim == 1
            if is_item and isinstance(args[1], slice) and args[1].step is None:
                begin = args[1].indices(len(first))[0]
                return cls._at(first.codes[args[1]], first.scale, first._row, first._start + begin)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*_made(args), **{name: _made(value) for name, value in kwargs.items()})


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


def _made(value: Any) -> Any:
    if isinstance(value, Scaled):
        return value.values()
    return type(value)(map(_made, value)) if type(value) in (tuple, list) else value
