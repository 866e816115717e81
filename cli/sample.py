"""`demerge sample`: images from a model, as PNG files."""

from __future__ import annotations

from demerge.cli.common import Json, execute
from demerge.cli.options import from_options
from demerge.diffusion.options import SampleInputs, SampleOptions


@from_options
def sample(inputs: SampleInputs, options: SampleOptions, *, json: Json = False) -> None:
    """Draw images from a model. Run the command again to draw the missing ones."""
    from demerge.diffusion.drawing import plan

    execute(plan(inputs, options), "sample", out=inputs.out, json=json)
