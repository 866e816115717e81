"""`demerge ema`: an expert with an average of another length, made after its training."""

from __future__ import annotations

from demerge.cli.common import Json, execute
from demerge.cli.options import from_options
from demerge.finetuning.options import ReaverageOptions


@from_options
def ema(options: ReaverageOptions, *, json: Json = False) -> None:
    """Make an expert with an EMA of any length, from the averages that `finetune` stored.

    demerge ema run/experts/0000-0250 --sigma-rel 0.07 -o run/ema/0000-0250
    """
    from demerge.finetuning.reaveraging import plan

    execute(plan(options), "ema", out=options.out, json=json)
