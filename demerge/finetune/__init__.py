"""Decoupled finetuning: one expert per range of timesteps, and the joint control, from one loop.

`options` what is asked, `plan` what it takes, `loop` over ranges, `run` the training of one expert, `objective` its loss,
`projection` the foldable W, `layers` a choice of what is trained, `state` its checkpoints.
"""

from demerge.finetune.loop import finetune
from demerge.finetune.options import FinetuneOptions
from demerge.finetune.plan import parse_ranges
from demerge.finetune.run import Progress

__all__ = ["FinetuneOptions", "Progress", "finetune", "parse_ranges"]
