"""Decoupled finetuning: one expert per range of timesteps, and the joint control, from one loop.

`options` the options, `planning` the plan and its cost, `executors` who trains the ranges,
`train` the loop over ranges, `trainer` the training of one expert, `objective` its loss,
`projection` the foldable W, `layers` which layers train, `checkpoint` its state on disk.
`losses`, `previews` and `trackers` watch a training; `power_averages` are stored by it, and
`reaveraging` makes an expert of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from demerge.lazy import lazily

if TYPE_CHECKING:
    from demerge.finetuning.options import FinetuneInputs, FinetuneOptions
    from demerge.finetuning.planning import parse_ranges, plan
    from demerge.finetuning.train import finetune
    from demerge.finetuning.trainer import TrainingStep

HOMES = {
    "FinetuneInputs": "options",
    "FinetuneOptions": "options",
    "TrainingStep": "trainer",
    "finetune": "train",
    "parse_ranges": "planning",
    "plan": "planning",
}
__all__ = [
    "FinetuneInputs",
    "FinetuneOptions",
    "TrainingStep",
    "finetune",
    "parse_ranges",
    "plan",
]
__getattr__, __dir__ = lazily(__name__, HOMES)
