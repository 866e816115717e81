"""`demerge coefficients`: weights for a merge, in closed form."""

from __future__ import annotations

from demerge.analysis.experts.options import CoefficientsOptions
from demerge.cli.common import Json, execute
from demerge.cli.options import from_options


@from_options
def coefficients(options: CoefficientsOptions, *, json: Json = False) -> None:
    """Find the weights of a merge by least squares, and predict how they change the loss.

    demerge coefficients base expert-0 expert-1 --data D --granularity block -o weights.json
    demerge merge base expert-0 expert-1 --weights weights.json -o merged
    """
    from demerge.analysis.planning.coefficients import plan

    execute(plan(options), "coefficients", out=options.out, json=json)
