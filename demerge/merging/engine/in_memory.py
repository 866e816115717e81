"""Merging state dicts in memory: the engine without files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from demerge.merging.contract import Method
from demerge.merging.engine.job import MergeJob
from demerge.merging.engine.reader import CHUNK
from demerge.merging.engine.validation import (
    Tensors,
    check_inputs,
    check_same_tensors,
    rounded,
    settle_weights,
)
from demerge.merging.registry import find, of
from demerge.timesteps import TimestepRange


def merge_tensors(
    base: Tensors,
    experts: Sequence[Tensors],
    method: str | Method | Callable[..., Tensor] = "task_arithmetic",
    *,
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Sequence[Tensors]] | None = None,
    ranges: Sequence[TimestepRange | None] = (),
    snr: Tensor | None = None,
    seed: int = 0,
    chunk: int = CHUNK,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Merge state dicts in memory; the result has the base's names, shapes and dtypes.

    Args:
        method: a name, `path.py:function`, or the function.
        weights: one per expert; 1/K each by default.
        inputs: for example {"fisher": [one mapping per expert]}.
        ranges: the timesteps of each expert, for methods that ask for them; `snr` [T] likewise.

    Raises:
        UsageError: where method, options or weights are wrong.
        InputError: where the experts do not fit the base.
    """
    chosen = (
        find(method)
        if isinstance(method, str)
        else method
        if isinstance(method, Method)
        else of(method)
    )
    settled, given, asked = (
        settle_weights(weights, len(experts)),
        inputs or {},
        chosen.settle(options or {}),
    )
    chosen = chosen.under(asked)
    check_same_tensors(base, experts, ["the base", *(f"expert {i}" for i in range(len(experts)))])
    check_inputs(chosen, base, given, len(experts))
    job = MergeJob(
        chosen,
        base,
        experts,
        settled,
        asked,
        {name: given[name] for name in chosen.inputs},
        seed,
        chunk=chunk,
        ranges=ranges or [None] * len(experts),
        snr=snr,
        device=device,
        threads=threads,
    )
    return assemble(job)


def assemble(job: MergeJob) -> dict[str, Tensor]:
    """Return all tensors of a merge, in the base's dtypes."""
    merged = {name: tensor.clone() for name, tensor in job.base.items()}
    chunks = job.stream(
        job.floating, lambda name, done: rounded(done.merged, job.base[name].dtype, name)
    )
    for name in job.floating:
        start, flat = 0, torch.empty_like(merged[name]).reshape(-1)
        while start < len(flat):
            chunk = next(chunks)
            flat[start : (start := start + len(chunk))] = chunk
        merged[name] = flat.view(merged[name].shape)
    return merged
