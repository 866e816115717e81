"""CUDA graphs: kernels that are recorded once and then launched together.

A small model on a fast GPU is bound by the launches of its kernels. What can be recorded reads its
inputs from buffers of its own and never waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3


def capture(
    compute: Callable[[], Tensor], device: torch.device, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record what `compute` does on a device, after some runs that let it allocate what it needs.

    Args:
        pool: memory that graphs share which never run at the same time; None is one of its own.

    Returns:
        the graph, and the tensor that each replay overwrites with the result.

    Raises:
        RuntimeError: if `compute` cannot be captured.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # another thread may use the device meanwhile, such as one that pins memory
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            result = compute()
    return graph, result
