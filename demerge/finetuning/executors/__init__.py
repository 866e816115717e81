"""Who trains the experts of a finetune: processes of this machine, a Ray cluster, or Slurm.

`options` the options, `tasks` what one task is and how it ends, `local`, `ray` and `slurm` one
executor each, `choice` which one a command gets.
"""
