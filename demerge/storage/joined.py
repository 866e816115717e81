"""Tensors one after the other as one tensor, which is made when it is used.

J [m *] = [P_1; P_2; ...],   P_i [m_i *],   m = sum m_i
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from demerge.storage.scaled import FLAT, SHAPED


class Joined(Tensor):
    """Parts that are joined by rows; treat it as read-only.

    Its shape and dtype cost nothing, and a span of it flattened reads what it needs of the parts.
    Everything else is done on the whole.
    """

    parts: Sequence[Tensor]

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Joined:
        """Return parts [m_i *] as one tensor; in float32 if their dtypes differ."""
        dtypes = {part.dtype for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        made = torch.empty(shape, dtype=dtype, device="meta").as_subclass(cls)
        made.parts = parts
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the parts lie."""
        return self.parts[0].device

    def values(self) -> Tensor:
        """Return the whole, made anew."""
        return torch.cat([part.to(self.dtype) for part in self.parts])

    def span(self, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a flat one."""
        found = []
        ends = accumulate(len(part) for part in self.parts)
        for part, end in zip(self.parts, ends, strict=True):
            begin = end - len(part)
            if begin < stop and start < end:
                piece = part[max(start, begin) - begin : min(stop, end) - begin]
                found.append(piece.to(self.dtype))
        if len(found) == 1:
            return found[0]
        return torch.cat(found) if found else torch.empty(0, dtype=self.dtype)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Answer shape and dtype, read spans from the parts, and make the whole for all else."""
        kwargs = kwargs or {}
        if getattr(function, "__self__", function) in SHAPED:
            parent: Any = super()
            return parent.__torch_function__(function, types, args, kwargs)
        first = args[0] if args else None
        if isinstance(first, Joined) and not kwargs:
            if function is Tensor.detach:
                return first
            if function in FLAT and args[1:] == (-1,):
                return cls.of([part.reshape(-1) for part in first.parts])
            is_item = function is Tensor.__getitem__ and first.ndim == 1
            if is_item and isinstance(args[1], slice) and args[1].step is None:
                start, stop, _ = args[1].indices(len(first))
                return first.span(start, max(start, stop))
        made = [_made(value) for value in args]
        return function(*made, **{name: _made(value) for name, value in kwargs.items()})


def _made(value: Any) -> Any:
    if isinstance(value, Joined):
        return value.values()
    return type(value)(map(_made, value)) if type(value) in (tuple, list) else value
