"""Tensors that are made when they are used, a span of their elements at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Read = Callable[[int, int], Tensor]  # elements [start, stop) of the flat tensor, anew


FLAT = (Tensor.reshape, Tensor.view)
SHAPED: tuple[Any, ...] = (
    Tensor.shape, Tensor.dtype, Tensor.ndim, Tensor.nbytes, Tensor.itemsize, Tensor.layout,
    Tensor.requires_grad, Tensor.size, Tensor.numel, Tensor.dim, Tensor.element_size,
    Tensor.is_floating_point, Tensor.is_contiguous, Tensor.__len__,
)  # fmt: skip


class Unread(Tensor):
    """A tensor [*] whose elements are made when they are used; treat it as read-only.

    Its shape and dtype cost nothing, and a span of it flattened makes that span alone. Everything
    else is done on the whole, which is made anew each time.
    """

    def values(self) -> Tensor:
        """Return the whole [*] as a plain tensor."""
        raise NotImplementedError

    def flat(self) -> Unread:
        """Return it flattened, still unread."""
        raise NotImplementedError

    def span(self, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a flat one."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Answer shape and dtype, make spans, and make the whole for all else."""
        kwargs = kwargs or {}
        if getattr(function, "__self__", function) in SHAPED:
            parent: Any = super()
            return parent.__torch_function__(function, types, args, kwargs)
        first = args[0] if args else None
        if isinstance(first, Unread) and not kwargs:
            if function is Tensor.detach:
                return first
            if function in FLAT and args[1:] == (-1,):
                return first.flat()
            is_item = function is Tensor.__getitem__ and first.ndim == 1
            if is_item and isinstance(args[1], slice) and args[1].step is None:
                start, stop, _ = args[1].indices(len(first))
                return first.span(start, max(start, stop))
        made = [_made(value) for value in args]
        return function(*made, **{name: _made(value) for name, value in kwargs.items()})


class Lazy(Unread):
    """A tensor [*] on the CPU of which a function makes the elements."""

    read: Read

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype, read: Read) -> Lazy:
        """Return a tensor of a shape."""
        made = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(cls)
        made.read = read
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where its elements are made."""
        return torch.device("cpu")

    def values(self) -> Tensor:
        """See `Unread`."""
        return self.read(0, self.numel()).view(self.shape)

    def flat(self) -> Lazy:
        """See `Unread`."""
        return self.of([math.prod(self.shape)], self.dtype, self.read)

    def span(self, start: int, stop: int) -> Tensor:
        """See `Unread`."""
        return self.read(start, stop)


def joined(parts: Sequence[Tensor]) -> Lazy:
    """Return parts [m_i *] as one tensor, by rows; in float32 if their dtypes differ."""
    dtypes = {part.dtype for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    ends = list(accumulate(part.numel() for part in parts))

    def read(start: int, stop: int) -> Tensor:
        found = [torch.empty(0, dtype=dtype)]
        for part, end in zip(parts, ends, strict=True):
            begin = end - part.numel()
            if begin < stop and start < end:
                span = slice(max(start, begin) - begin, min(stop, end) - begin)
                found.append(part.reshape(-1)[span].to(dtype))
        return found[1] if len(found) == 2 else torch.cat(found)

    return Lazy.of(shape, dtype, read)


def _made(value: Any) -> Any:
    if isinstance(value, Unread):
        return value.values()
    return type(value)(map(_made, value)) if type(value) in (tuple, list) else value
