"""Decoupled finetuning: one expert per range of timesteps, and the joint control, from one loop.

`options` what is asked, `plan` what it takes, `loop` over ranges, `run` the training of one expert, `objective` its loss,
`projection` the foldable W, `layers` a choice of what is trained, `state` its checkpoints.
"""

from demerge.finetuning.options import FinetuneOptions
from demerge.finetuning.planning import parse_ranges
from demerge.finetuning.train import finetune
from demerge.finetuning.trainer import Progress

__all__ = ["FinetuneOptions", "Progress", "finetune", "parse_ranges"]
