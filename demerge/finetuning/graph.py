"""The whole step as one CUDA graph: captured once, then replayed with the next batch's values.

What it needs, besides what all graphs do (`demerge.diffusion.cuda_graph`): every batch has the same
shapes, and the rates are scalars on the device. `demerge.finetuning.step` is written for that. The
steps before the capture compute everything and change nothing (`Step.hold`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from demerge.diffusion.cuda_graph import capture
from demerge.finetuning.batches import Batch
from demerge.finetuning.step import Rates, Step


class CapturedStep:
    """A step that is replayed; called as `Step` is, with batches of the same shapes.

    Raises:
        RuntimeError: if a module of the model cannot be captured; the expert is unchanged.
    """

    def __init__(self, step: Step, batches: Sequence[Batch], rates: Rates) -> None:
        self.batches = [batch.copy() for batch in batches]
        step.hold.fill_(1)
        try:
            self.graph, self.loss = capture(lambda: step(self.batches, rates), step.device)
        finally:
            step.hold.fill_(0)

    def __call__(self, batches: Sequence[Batch], rates: Rates) -> Tensor:
        """Replay the step on these batches; `rates` are in the tensors of the capture."""
        for own, new in zip(self.batches, batches, strict=True):
            for target, source in zip(own.tensors(), new.tensors(), strict=True):
                target.copy_(source, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()
