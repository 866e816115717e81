r"""The matrices that adapters store as factors; a product is a delta before its scale.

    LoRA        B A                             up, down
    LoCon       sum_pq B[o, p] M[p, q] A[q]     with a middle (a convolution)
    LoHa        (W1a W1b) * (W2a W2b)           elementwise; by cores t1, t2 for a convolution:
                W1 = sum_pq t1[p, q] W1a[p, o] W1b[q, i]
    LoKr        W1 (x) W2                       Kronecker; each whole, W1a W1b, or W2a t2 W2b
    difference  as it is                        diff, diff_b, w_norm, b_norm

LoRA (arXiv 2106.09685), LoHa (FedPara, 2108.06098), LoKr (LyCORIS, 2309.14859). A product is a
matrix [m n], the weight as (out, in k k), made some rows at a time in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from demerge.errors import InputError
from demerge.storage.checkpoint import Checkpoint, finite

Shape = tuple[int, ...]
Rows = Callable[[int, int], Tensor]  # rows [start, stop) of a product, float64
LORA, DIFFERENCE = frozenset({"down", "up", "mid"}), frozenset({"diff"})
LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"})
LOKR = frozenset({
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"
})  # fmt: skip
FACTORS = {"LoRA": LORA, "LoHa": LOHA, "LoKr": LOKR, "difference": DIFFERENCE}


class MissingFactorError(ValueError):
    """A product lacks a factor."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product of factors.

    Attributes:
        kind: one of `FACTORS`.
        shape: of the weight, as far as the factors say: a convolution may be a matrix [m n].
        rank: that alpha is divided by; None for factors that are stored whole.
        bound: the largest rank that the product can have.
        open: reads the factors; returns what makes rows.
    """

    kind: str
    shape: Shape
    rank: int | None
    bound: int
    open: Callable[[], Rows]


def find_product(file: Checkpoint, parts: Mapping[str, str]) -> Product:
    """Return the product of some keys, by their roles.

    Raises:
        ValueError: if a factor is missing, or their shapes do not chain.
    """
    roles = set(parts) - {"alpha", "magnitude", "dora_scale"}
    kinds = [kind for kind, factors in FACTORS.items() if roles & factors]
    if len(kinds) > 1:
        raise ValueError(f"factors of {' and '.join(kinds)} on one module")
    make = {"LoHa": _loha, "LoKr": _lokr, "difference": _difference}
    return make.get(kinds[0] if kinds else "LoRA", _lora)(file, parts)


def read(file: Checkpoint, key: str) -> Tensor:
    """Return a factor in float64.

    Raises:
        InputError: if it holds NaN or Inf.
    """
    if not finite(file[key]):
        what = f"{file.place.path}: {key} holds NaN or Inf"
        raise InputError(what, fix="use another file of this LoRA")
    return file[key].double()


def as_product(shapes: Sequence[Shape]) -> str:
    """Return the shapes of factors as text: `[4, 2] times [2, 3]`."""
    return " times ".join(str(list(shape)) for shape in shapes)


def _lora(file: Checkpoint, parts: Mapping[str, str]) -> Product:
    _check_present(parts, "down", "up")
    up, down, mid = parts["up"], parts["down"], parts.get("mid")
    shapes = [file.specs[key].shape for key in (up, mid, down) if key is not None]
    shape = _chain(shapes)
    if not shape:
        raise ValueError(f"{up} and {down} are {as_product(shapes)}")

    def open_factors() -> Rows:
        A, B = read(file, down).flatten(1), read(file, up).flatten(1)
        if mid is not None:
            M = read(file, mid).flatten(2)
            A = torch.einsum("pqk,qi->pik", M, A).flatten(1)
        return lambda start, stop: B[start:stop] @ A

    return Product("LoRA", shape, shapes[-1][0], shapes[-1][0], open_factors)


def _chain(shapes: Sequence[Shape]) -> Shape:
    """Return the shape of B A or B M A from those of its factors, () if they do not chain."""
    up, *middle, down = shapes
    if len(up) < 2 or len(down) < 2 or math.prod(up[2:]) != 1 or 0 in (*up, *down):
        return ()
    if not middle:
        return (up[0], *down[1:]) if up[1] == down[0] else ()
    mid = middle[0]
    chained = len(mid) > 2 and mid[:2] == (up[1], down[0]) and math.prod(down[2:]) == 1
    return (up[0], down[1], *mid[2:]) if chained else ()


def _loha(file: Checkpoint, parts: Mapping[str, str]) -> Product:
    _check_present(parts, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    pairs = [_Pair.of(file, parts, f"hada_w{i}", f"hada_t{i}") for i in (1, 2)]
    if pairs[0].shape != pairs[1].shape:
        raise ValueError(f"the two factors are {as_product([pair.shape for pair in pairs])}")

    def open_factors() -> Rows:
        one, other = (pair.open() for pair in pairs)
        return lambda start, stop: one(start, stop) * other(start, stop)

    ranks = [pair.rank for pair in pairs]
    return Product("LoHa", pairs[0].shape, ranks[0], math.prod(ranks), open_factors)


def _lokr(file: Checkpoint, parts: Mapping[str, str]) -> Product:
    factors = [_find_factor(file, parts, i) for i in (1, 2)]
    shapes = [pair.shape if isinstance(pair, _Pair) else file.specs[pair].shape for pair in factors]
    ranks = [pair.rank for pair in factors if isinstance(pair, _Pair)]
    if any(len(shape) < 2 or 0 in shape for shape in shapes) or math.prod(shapes[0][2:]) != 1:
        raise ValueError(f"the two factors are {as_product(shapes)}")
    (a, b, *_), (c, d, *kernel) = shapes
    height = c

    def open_factors() -> Rows:
        one, other = (
            pair.open()(0, pair.shape[0])
            if isinstance(pair, _Pair)
            else read(file, pair).flatten(1)
            for pair in factors
        )

        def rows(start: int, stop: int) -> Tensor:
            first, last = start // height, -(-stop // height)
            return torch.kron(one[first:last], other)[start - first * height :][: stop - start]

        return rows

    bound = min(a, b) * min(c, d * math.prod(kernel))
    rank = ranks[-1] if ranks else None
    return Product("LoKr", (a * c, b * d, *kernel), rank, bound, open_factors)


def _find_factor(file: Checkpoint, parts: Mapping[str, str], i: int) -> str | _Pair:
    """Return the key of a whole factor, or its two factors."""
    if f"lokr_w{i}" in parts:
        return parts[f"lokr_w{i}"]
    _check_present(parts, f"lokr_w{i}_a", f"lokr_w{i}_b")
    return _Pair.of(file, parts, f"lokr_w{i}", f"lokr_t{i}")


@dataclass(frozen=True, slots=True)
class _Pair:
    """A product of two factors, a [m r] and b [r n], or by a core t [r r k k], a [r m] and b [r n].

    Attributes:
        shape: of the product: (m, n), or (m, n, k, k).
    """

    file: Checkpoint
    a: str
    b: str
    core: str | None
    shape: Shape
    rank: int

    @classmethod
    def of(cls, file: Checkpoint, parts: Mapping[str, str], name: str, core: str) -> _Pair:
        a, b, t = parts[f"{name}_a"], parts[f"{name}_b"], parts.get(core)
        shapes = [file.specs[key].shape for key in (a, t, b) if key is not None]
        one, other = shapes[0], shapes[-1]
        is_matrix = len(one) == len(other) == 2 and 0 not in (*one, *other)
        if is_matrix and t is None and one[1] == other[0]:
            return cls(file, a, b, None, (one[0], other[1]), other[0])
        middle = file.specs[t].shape if t is not None else ()
        if is_matrix and len(middle) > 2 and middle[:2] == (one[0], other[0]):
            return cls(file, a, b, t, (one[1], other[1], *middle[2:]), other[0])
        raise ValueError(f"{a} and {b} are {as_product(shapes)}")

    def open(self) -> Rows:
        A, B = read(self.file, self.a), read(self.file, self.b)
        if self.core is None:
            return lambda start, stop: A[start:stop] @ B
        C = torch.einsum("pqk,qi->pik", read(self.file, self.core).flatten(2), B).flatten(1)
        return lambda start, stop: A[:, start:stop].T @ C


def _difference(file: Checkpoint, parts: Mapping[str, str]) -> Product:
    shape = file.specs[parts["diff"]].shape
    if not shape or 0 in shape:
        raise ValueError(f"{parts['diff']} is {list(shape)}")

    def open_factors() -> Rows:
        whole = read(file, parts["diff"]).reshape(shape[0], -1)
        return lambda start, stop: whole[start:stop]

    return Product("difference", shape, None, min(shape[0], math.prod(shape[1:])), open_factors)


def _check_present(parts: Mapping[str, str], *roles: str) -> None:
    absent = [role for role in roles if role not in parts]
    if absent:
        raise MissingFactorError(" and ".join(absent))
