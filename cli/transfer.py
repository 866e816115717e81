"""`demerge transfer`: what each expert does to the loss of each range, from a stored map."""

from __future__ import annotations

from demerge.analysis.experts.options import TransferOptions
from demerge.cli.common import Json, execute
from demerge.cli.options import from_options


@from_options
def transfer(options: TransferOptions, *, json: Json = False) -> None:
    """Predict how each expert changes the loss of each range, to first order.

    It needs no GPU, and neither the model nor its data.

    demerge transfer runs/conflict experts/*-* --base base -o runs/transfer
    """
    from demerge.analysis.planning.transfer import plan

    execute(plan(options), "transfer", out=options.out, json=json)
