"""What must hold of a merge: its weights, tensors and inputs before it begins, its numbers
after.
"""

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
SATURATING = (torch.float8_e4m3fn, torch.float8_e5m2)  # torch may round Inf to the largest number
STATS = "measure what is missing: demerge stats EXPERT... --data D --statistics"
MAKE: Mapping[str, str] = {  # how to make the tensors that the built-in methods need
    "fisher": f"{STATS} fisher; or take those of the ranges at the base: "
    "demerge analyze BASE --data D --fisher RANGES -o MAP, then --option fisher=MAP/fisher",
    "gram": f"{STATS} gram",
}


def resolve_weights(weights: Sequence[float] | None, K: int) -> list[float]:
    """Return K finite weights, 1/K each by default."""
    if K == 0:
        raise UsageError("there is no expert to merge", fix="name at least one")
    resolved = [1 / K] * K if weights is None else [float(w) for w in weights]
    if len(resolved) != K or not all(map(math.isfinite, resolved)):
        what = f"weights {resolved} are not {K} finite numbers"
        raise UsageError(what, fix="give one per expert, in their order")
    return resolved


def holds_deltas(expert: Tensors) -> bool:
    """Whether an expert, like an adapter, holds differences to the base, and 0 if it has none."""
    return bool(getattr(expert, "holds_deltas", False))


def check_same_tensors(
    base: Tensors,
    experts: Sequence[Tensors],
    names: Sequence[str],
    fix: str = "merge models finetuned from this base",
) -> None:
    """Refuse experts with missing, extra or different tensors."""
    for expert, label in zip(experts, names[1:], strict=True):
        if holds_deltas(expert):
            continue
        faults: dict[str, list[str]] = {
            "missing": [n for n in base if n not in expert],
            "extra": [n for n in expert if n not in base],
        }
        common = [n for n in base if n in expert]
        for kind, found in find_differences(base, expert, common).items():
            faults[kind] = list(found.values())
        clauses = [f"{len(ns)} {kind}: {listed(ns)}" for kind, ns in faults.items() if ns]
        if clauses:
            what = f"{label} does not fit {names[0]}: {'; '.join(clauses)}"
            raise InputError(what, fix=fix)


def find_differences(
    base: Tensors, expert: Tensors, names: Iterable[str]
) -> dict[str, dict[str, str]]:
    """Return which tensors do not fit each other: kind of difference -> name -> what to print."""
    shapes: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    unequal: dict[str, str] = {}
    for name in names:
        mine, its = base[name], expert[name]
        same_kind = mine.is_floating_point() == its.is_floating_point()
        if mine.shape != its.shape:
            shapes[name] = f"{name} {list(its.shape)} for {list(mine.shape)}"
        if not same_kind:
            dtypes[name] = f"{name} {its.dtype} for {mine.dtype}"
        is_fixed = mine.shape == its.shape and same_kind and not mine.is_floating_point()
        if is_fixed and not torch.equal(mine, its.to(mine.dtype)):
            unequal[name] = name
    return {
        "of another shape": shapes,
        "of another kind of dtype": dtypes,
        "of unequal integers": unequal,
    }


def check_inputs(
    method: Method, base: Tensors, inputs: Mapping[str, Sequence[Tensors]], K: int
) -> None:
    """Refuse a merge whose method needs tensors that are missing or do not fit."""
    for name in method.inputs:
        sources = inputs.get(name, ())
        if len(sources) != K:
            what = (
                f"method {method.name} needs {name} for each of {K} experts, {len(sources)} given"
            )
            make = MAKE.get(name, f"put {name}.safetensors next to each expert.json")
            raise UsageError(what, fix=f"{make}, or give --option {name}=PATH,PATH")
        for i, tensors in enumerate(sources):
            if name in method.optional_inputs:
                wrong, rule = [n for n in tensors if n not in base], "that the base does not have"
            else:
                wrong, rule = _unfit(tensors, base), "missing or of another shape"
            if wrong:
                what = f"{name} of expert {i}: {len(wrong)} tensors {rule}: {', '.join(wrong[:5])}"
                raise InputError(what, fix=f"make {name}.safetensors with this expert")


def _unfit(tensors: Tensors, base: Tensors) -> list[str]:
    merged = [n for n, t in base.items() if t.is_floating_point()]
    return [n for n in merged if n not in tensors or tensors[n].shape != base[n].shape]


@contextlib.contextmanager
def name_method_in_errors(method: Method, name: str | None) -> Iterator[None]:
    """Name the method and the tensor if a function of another package fails."""
    try:
        yield
    except (DemergeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if method.function.__module__.startswith("demerge."):
            raise
        place = f" at tensor {name}" if name else ""
        what = f"method {method.name} fails{place}: {type(error).__name__}: {error}"
        fix = "fix the method; demerge.testing.check_method finds such faults"
        raise UsageError(what, fix=fix) from error


def check_same_size(method: Method, name: str, base: Tensor, merged: object) -> None:
    """Refuse a result that cannot take the base's place."""
    if not isinstance(merged, Tensor) or merged.numel() != base.numel():
        found = list(merged.shape) if isinstance(merged, Tensor) else type(merged).__name__
        what = f"method {method.name} returns {found} for {list(base.shape)} of tensor {name}"
        raise UsageError(what, fix="return a tensor of the base's shape")


def round_chunk(chunk: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Round a chunk to the dtype it is stored in, on the CPU."""
    stored = chunk.to("cpu", dtype)
    if stored.dtype == chunk.dtype:
        return stored
    is_saturated = False
    if dtype in SATURATING and len(chunk):
        is_saturated = float(chunk.abs().max()) > torch.finfo(dtype).max * (1 + 2.0**-6)
    if is_saturated or not finite(stored):
        is_narrow = dtype in (torch.float16, *SATURATING)
        fix = "use --save-dtype bfloat16 or float32" if is_narrow else "use smaller weights"
        raise NumericalError(f"tensor {name} does not fit {dtype}", fix=fix)
    return stored
