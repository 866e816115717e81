"""`demerge ranges`: where to cut a base's timesteps, from a stored conflict map."""

from __future__ import annotations

from demerge.analysis.partitioning.options import RangesOptions
from demerge.cli.common import Json, emit, say, show
from demerge.cli.options import from_options


@from_options(record=False)
def ranges(options: RangesOptions, *, json: Json = False) -> None:
    """Cut [0, T) into ranges by a stored map; say what they gain and how sure that is.

    The model and its data are not needed.
    """
    from demerge.analysis.planning.ranges import plan

    result = plan(options).run()
    say(*result.lines())
    emit(result.document(), options.out, json)
    if options.out is None and not json:
        show(" ".join(f"{span.start}:{span.stop}" for span in result.summary.partition))
