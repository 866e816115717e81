"""The whole step as one CUDA graph: captured once, then replayed with the next batch's values.

A small model on a fast GPU is bound by the launches of its kernels. A replay launches all of them
at once. What it needs: every batch has the same shapes, the batch lies in buffers of its own, the
rates are scalars on the device, and no kernel waits for the host. `demerge.finetuning.step` is
written for that. The steps before the capture compute everything and change nothing (`Step.hold`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from demerge.finetuning.batches import Batch
from demerge.finetuning.step import Rates, Step

WARM_UP = 3


class CapturedStep:
    """A step that is replayed; called as `Step` is, with batches of the same shapes.

    Raises:
        RuntimeError: if a module of the model cannot be captured; the expert is unchanged.
    """

    def __init__(self, step: Step, batches: Sequence[Batch], rates: Rates) -> None:
        self.step, self.rates = step, rates
        self.batches = [batch.copy() for batch in batches]
        step.hold.fill_(1)
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    step(self.batches, rates)
            torch.cuda.current_stream().wait_stream(stream)
            step.optimizer.zero_grad(set_to_none=True)
            self.graph = torch.cuda.CUDAGraph()
            # a thread may pin the memory of the next batch meanwhile
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.loss = step(self.batches, rates)
        finally:
            step.hold.fill_(0)

    def __call__(self, batches: Sequence[Batch], rates: Rates) -> Tensor:
        """Replay the step on these batches; `rates` are in the tensors of the capture."""
        for own, new in zip(self.batches, batches, strict=True):
            for target, source in zip(own.tensors(), new.tensors(), strict=True):
                target.copy_(source, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()
