"""`demerge landscape`: how long and how alike task vectors are, and the loss around their base."""

from __future__ import annotations

from demerge.analysis.experts.options import LandscapeOptions
from demerge.cli.common import Json, execute
from demerge.cli.options import from_options


@from_options
def landscape(options: LandscapeOptions, *, json: Json = False) -> None:
    """Compare the task vectors of experts, and measure the loss on the way to and between them.

    demerge landscape base expert-0 expert-1 --data D --merged merged -o landscape
    """
    from demerge.analysis.planning.landscape import plan

    execute(plan(options), "landscape", out=options.out, json=json)
