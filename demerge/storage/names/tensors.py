"""The tensors of a model under the names of the other layout: joined, split, or as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from demerge.storage.names.family import Family, Names, Span

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, Sequence[int]]
Rows = tuple[str, Span | None]  # of a tensor; None for all


class Renamed(Mapping[str, "Tensor"]):
    """Tensors in the original layout, or in that of diffusers, made of those in the other one.

    A tensor that is split is a view. One that is joined is made when it is read, and the last one
    is kept.

    Raises:
        ValueError: if a part of a joined matrix is missing, or a matrix cannot be split.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], shapes: Shapes, family: Family, *, to_original: bool
    ) -> None:
        self._tensors = tensors
        self.rows = rename_rows(shapes, family, to_original=to_original)
        self._last: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._last:
            self._last = {}
            self._last = {name: self._make(self.rows[name])}
        return self._last[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def _make(self, rows: Sequence[Rows]) -> Tensor:
        import torch

        parts = [self._tensors[name][slice(*span)] if span else self._tensors[name]
                 for name, span in rows]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def rename_rows(shapes: Shapes, family: Family, *, to_original: bool) -> dict[str, list[Rows]]:
    """Return what each tensor of a layout is, of tensors in the other one; or as it is.

    Raises:
        ValueError: if a part of a joined matrix is missing, or a matrix cannot be split.
    """
    return _join(shapes, family) if to_original else _split(shapes, family)


def _split(shapes: Shapes, family: Family) -> dict[str, list[Rows]]:
    """Return what each of diffusers' tensors is, of tensors in the original layout."""
    made: dict[str, list[Rows]] = {}
    for name, shape in shapes.items():
        stem, parts = _find_parts(name, family)
        if len(parts) < 2:
            made[parts[0] if parts else name] = _halves(name, stem, shapes, family)
            continue
        spans = family.split_rows(tuple(map(_module, parts)), next(iter(shape), 0))
        made |= {part: [(name, span)] for part, span in zip(parts, spans, strict=True)}
    return made


def _join(shapes: Shapes, family: Family) -> dict[str, list[Rows]]:
    """Return what each of the original tensors is, of tensors in diffusers' layout."""
    made: dict[str, list[Rows]] = {}
    for name in shapes:
        module = _module(name)
        if family.to_diffusers(module):
            made[name] = [(name, None)]
            continue
        original = family.to_original(module)[0] + name.removeprefix(module)
        if original == name:  # an entry of the table may be a tensor
            original = family.to_original(name)[0]
        stem, parts = _find_parts(original, family)
        if len(parts) < 2:
            made[original] = _halves(name, stem, shapes, family)
        elif missing := [part for part in parts if part not in shapes]:
            raise ValueError(f"{original} needs {', '.join(missing)}, which are missing")
        elif not _can_join([shapes[part] for part in parts]):
            raise ValueError(f"{', '.join(parts)} cannot be joined by rows")
        else:
            made[original] = [(part, None) for part in parts]
    return made


def _can_join(shapes: Sequence[Sequence[int]]) -> bool:
    """Return whether tensors have rows, of one shape."""
    return all(shapes) and all(tuple(s[1:]) == tuple(shapes[0][1:]) for s in shapes)


def _find_parts(original: str, family: Family) -> tuple[str, Names]:
    """Return the module of an original tensor, and the names of diffusers' tensors that it is."""
    stem = _module(original)
    suffix = original.removeprefix(stem)
    return stem, tuple(part + suffix for part in family.to_diffusers(stem))


def _halves(name: str, original: str, shapes: Shapes, family: Family) -> list[Rows]:
    """Return the rows of a tensor, whose halves change places if they are shift and scale."""
    weight = shapes.get(f"{_module(name)}.weight", ())
    if len(weight) < 2 or not family.is_swapped(original, weight):
        return [(name, None)]
    rows = weight[0]
    return [(name, (rows // 2, rows)), (name, (0, rows // 2))]


def _module(name: str) -> str:
    """Return the module of a tensor, or the name of a tensor that stands alone."""
    return name.removesuffix(".weight").removesuffix(".bias")
