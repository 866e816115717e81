"""`demerge stats`: what merge methods that use data need to know of each expert's range."""

from __future__ import annotations

from demerge.cli.common import Json, execute
from demerge.cli.options import from_options
from demerge.statistics.options import StatisticsOptions


@from_options
def stats(options: StatisticsOptions, *, json: Json = False) -> None:
    """Measure the Fisher and the input Gram matrices of each expert on its range, for `merge`.

    Run the command again to measure only what is missing.
    """
    from demerge.statistics import plan

    execute(plan(options), "stats", out=options.out, json=json)
