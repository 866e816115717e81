"""What must hold of a merge: weights, keys, shapes, dtypes, inputs before it begins, finite numbers that fit while it runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from demerge.errors import DemergeError, InputError, NumericalError, UsageError, listed
from demerge.merging.contract import Method
from demerge.storage.checkpoint import finite

Tensors = Mapping[str, Tensor]
SATURATING = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # torch may round what is too large to the largest number
STATS = "make what is missing next to the experts: demerge stats EXPERT... --data D --statistics"
MAKE: Mapping[str, str] = {  # how the tensors are made that methods of our own need
    "fisher": f"{STATS} fisher; or take those of the ranges at the base: demerge analyze BASE --data D --fisher RANGES -o MAP, "
    "then --option fisher=MAP/fisher",
    "gram": f"{STATS} gram",
}


def settle_weights(weights: Sequence[float] | None, K: int) -> list[float]:
    """Return K finite weights, 1/K each by default.

    Raises:
        UsageError: where there is no expert, or the weights are not one finite number for each.
    """
    if K == 0:
        raise UsageError("there is no expert to merge", fix="name at least one")
    settled = [1 / K] * K if weights is None else [float(w) for w in weights]
    if len(settled) != K or not all(map(math.isfinite, settled)):
        raise UsageError(
            f"weights {settled} are not {K} finite numbers",
            fix="give one per expert, in their order",
        )
    return settled


def holds_deltas(expert: Tensors) -> bool:
    """Whether an expert's tensors are differences to the base, and 0 where it has none, as with an adapter."""
    return bool(getattr(expert, "holds_deltas", False))


def check_same_tensors(base: Tensors, experts: Sequence[Tensors], names: Sequence[str]) -> None:
    """Refuse experts whose tensors are missing, extra, of another shape, or unequal where they are not merged.

    Raises:
        InputError: with one line for each kind of difference.
    """
    for expert, label in zip(experts, names[1:], strict=True):
        if holds_deltas(expert):
            continue
        found = {
            "missing": [n for n in base if n not in expert],
            "extra": [n for n in expert if n not in base],
            **{
                what: list(told.values())
                for what, told in unlike(base, expert, [n for n in base if n in expert]).items()
            },
        }
        lines = "; ".join(
            f"{len(told)} {what}: {listed(told)}" for what, told in found.items() if told
        )
        if lines:
            raise InputError(
                f"{label} does not fit {names[0]}: {lines}",
                fix="merge models finetuned from this base",
            )


def unlike(base: Tensors, expert: Tensors, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return which tensors of two models do not fit each other: kind of difference -> name -> what to say of it."""
    pairs = {n: (base[n], expert[n]) for n in names}
    shapes = {
        n: f"{n} {list(its.shape)} for {list(mine.shape)}"
        for n, (mine, its) in pairs.items()
        if mine.shape != its.shape
    }
    kinds = {
        n: f"{n} {its.dtype} for {mine.dtype}"
        for n, (mine, its) in pairs.items()
        if mine.is_floating_point() != its.is_floating_point()
    }
    fixed = {
        n: pair
        for n, pair in pairs.items()
        if n not in shapes and n not in kinds and not pair[0].is_floating_point()
    }
    unequal = {
        n: n for n, (mine, its) in fixed.items() if not torch.equal(mine, its.to(mine.dtype))
    }
    return {
        "of another shape": shapes,
        "of another kind of dtype": kinds,
        "of unequal integers": unequal,
    }


def check_inputs(
    method: Method, base: Tensors, inputs: Mapping[str, Sequence[Tensors]], K: int
) -> None:
    """Refuse a merge whose method needs tensors that are not there.

    Raises:
        UsageError: where an input is not given for each expert.
        InputError: where one lacks a tensor or has another shape, or, where some may be lacking, is of another model.
    """
    for name in method.inputs:
        given = inputs.get(name, ())
        if len(given) != K:
            raise UsageError(
                f"method {method.name} needs {name} for each of {K} experts, {len(given)} given",
                fix=f"{MAKE.get(name, f'put {name}.safetensors beside each expert.json')}, or give --option {name}=PATH,PATH",
            )
        for i, tensors in enumerate(given):
            if name in method.partial:
                _check_known_keys(name, i, tensors, base)
                continue
            merged = [n for n, t in base.items() if t.is_floating_point()]
            wrong = [n for n in merged if n not in tensors or tensors[n].shape != base[n].shape]
            if wrong:
                raise InputError(
                    f"{name} of expert {i}: {len(wrong)} tensors missing or of another shape: {', '.join(wrong[:5])}",
                    fix=f"make {name}.safetensors with this expert",
                )


def _check_known_keys(name: str, i: int, tensors: Tensors, base: Tensors) -> None:
    unknown = [n for n in tensors if n not in base]
    if unknown:
        raise InputError(
            f"{name} of expert {i}: {len(unknown)} tensors that the base does not have: {', '.join(unknown[:5])}",
            fix=f"make {name}.safetensors with this expert",
        )


@contextlib.contextmanager
def blamed(method: Method, name: str | None) -> Iterator[None]:
    """Name the method and the tensor where a function of another package fails; a fault of ours stays what it is.

    Raises:
        UsageError: with what the function raised.
    """
    try:
        yield
    except (DemergeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if method.function.__module__.startswith("demerge."):
            raise
        what = f"method {method.name} fails{f' at tensor {name}' if name else ''}: {type(error).__name__}: {error}"
        raise UsageError(
            what, fix="mend it; demerge.testing.check_method finds such faults"
        ) from error


def check_same_size(method: Method, name: str, base: Tensor, merged: object) -> None:
    """Refuse a result that cannot take the base's place.

    Raises:
        UsageError: saying what the method returned.
    """
    if not isinstance(merged, Tensor) or merged.numel() != base.numel():
        found = list(merged.shape) if isinstance(merged, Tensor) else type(merged).__name__
        raise UsageError(
            f"method {method.name} returns {found} for {list(base.shape)} of tensor {name}",
            fix="return a tensor of the base's shape",
        )


def rounded(chunk: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Round a chunk to the dtype it is stored in, on the CPU.

    Raises:
        NumericalError: where a value is too large for it.
    """
    stored = chunk.to("cpu", dtype)
    if stored.dtype == chunk.dtype:
        return stored
    saturated = (
        dtype in SATURATING
        and len(chunk)
        and float(chunk.abs().max()) > torch.finfo(dtype).max * (1 + 2.0**-6)
    )
    if saturated or not finite(stored):
        wider = dtype in (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
        fix = "use --save-dtype bfloat16 or float32" if wider else "use smaller weights"
        raise NumericalError(f"tensor {name} does not fit {dtype}", fix=fix)
    return stored
