"""Merging state dicts in memory: the engine without files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from demerge.merging.contract import Method
from demerge.merging.engine.job import Execution, MergedChunk, MergeJob
from demerge.merging.engine.reader import CHUNK
from demerge.merging.engine.validation import (
    Tensors,
    check_inputs,
    check_same_tensors,
    resolve_weights,
    round_chunk,
)
from demerge.merging.registry import find_method, method_of
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
    num_workers: int = 1,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Merge state dicts in memory; the result has the base's names, shapes and dtypes.

    Args:
        method: a name, `path.py:function`, or the function.
        weights: one per expert; 1/K each by default.
        inputs: for example {"fisher": [one mapping per expert]}.
        ranges: the timesteps of each expert, for methods that ask for them; `snr` [T] likewise.

    Raises:
        UsageError: if method, options or weights are wrong.
        InputError: if the experts do not fit the base.
    """
    if isinstance(method, str):
        method = find_method(method)
    elif not isinstance(method, Method):
        method = method_of(method)
    K, sources = len(experts), inputs or {}
    resolved_weights = resolve_weights(weights, K)
    resolved = method.resolve_options(options or {})
    method = method.specialize(resolved)
    check_same_tensors(base, experts, ["the base", *(f"expert {i}" for i in range(K))])
    check_inputs(method, base, sources, K)
    job = MergeJob(
        method,
        base,
        experts,
        resolved_weights,
        resolved,
        {name: sources[name] for name in method.inputs},
        seed,
        ranges=ranges or [None] * K,
        snr=snr,
        execution=Execution(device, num_workers, chunk=chunk),
    )
    return assemble(job)


def assemble(job: MergeJob) -> dict[str, Tensor]:
    """Return all tensors of a merge, in the base's dtypes."""
    merged = {name: tensor.clone() for name, tensor in job.base.items()}

    def rounded(name: str, done: MergedChunk) -> Tensor:
        return round_chunk(done.merged, job.base[name].dtype, name)

    for name, chunks in job.stream_tensors(job.floating, rounded):
        if chunks:
            merged[name] = torch.cat(chunks).to(merged[name].device).view(merged[name].shape)
    return merged
