"""`demerge evaluate`: scores of models and image folders, with their protocol."""

from __future__ import annotations

from demerge.cli.common import Json, execute
from demerge.cli.options import from_options
from demerge.evaluation.options import EvaluationInputs, EvaluationOptions


@from_options
def evaluate(inputs: EvaluationInputs, options: EvaluationOptions, *, json: Json = False) -> None:
    """Score models against real images. Run the command again to resume."""
    from demerge.evaluation.planning import plan

    planned = plan(inputs.models, inputs.data, inputs.out, options, base=inputs.base)
    execute(planned, "evaluate", out=inputs.out / "scores", json=json)
