"""Decoupled finetuning: one expert per range of timesteps, and the joint control, from one loop.

`options` what is asked, `objective` the loss, `projection` the foldable W, `state` checkpoints, `loop` the training.
"""

from demerge.finetune.loop import Progress, finetune, parse_ranges
from demerge.finetune.options import FinetuneOptions

__all__ = ["FinetuneOptions", "Progress", "finetune", "parse_ranges"]
