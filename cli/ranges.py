"""`demerge ranges`: where to cut a base's timesteps; `ranges check`: what a boundary means."""

from __future__ import annotations

from demerge.analysis.partitioning.options import BoundaryOptions, RangesOptions
from demerge.cli.common import Json, emit, say, show
from demerge.cli.options import from_options


@from_options(record=False)
def ranges(options: RangesOptions, *, json: Json = False) -> None:
    """Cut [0, T) into ranges by a stored map; say what they gain and how sure that is.

    The model and its data are not needed. --for prints ranges for another trainer. `demerge ranges
    check` says what a boundary is in each convention.
    """
    from demerge.analysis.planning.ranges import plan

    result = plan(options).run()
    say(*result.lines())
    emit(result.document(), options.out, json)
    if not json:
        show(*result.answer())


@from_options(record=False)
def check(options: BoundaryOptions, *, json: Json = False) -> None:
    """Show a boundary between two experts in each convention, and the draws that each one gets."""
    from demerge.analysis.planning.boundary import check_boundary

    result = check_boundary(options)
    emit(result.document(), None, json)
    if not json:
        show(*result.lines())
