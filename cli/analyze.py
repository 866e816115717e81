"""`demerge analyze`: how the timesteps of a base conflict, and which ranges to train experts on."""

from __future__ import annotations

from demerge.analysis.measurement.options import AnalyzeInputs, MeasurementOptions
from demerge.analysis.partitioning.options import PartitionOptions
from demerge.cli.common import Json, execute, say
from demerge.cli.options import from_options


@from_options
def analyze(
    inputs: AnalyzeInputs,
    options: MeasurementOptions,
    partition: PartitionOptions,
    *,
    json: Json = False,
) -> None:
    """Measure how timesteps conflict, partition them into ranges, and say how sure that is.

    The map is kept: the same command again only partitions anew, and more --groups are added to it.
    After an interruption, run the command again to resume. Under `accelerate launch` or `torchrun`
    the processes share the groups.
    """
    from demerge.analysis.planning.analyze import plan as plan_analysis

    plan = plan_analysis(inputs, options, partition, tell=say)
    if plan.world.is_main:
        execute(plan, "analyze", out=inputs.out, json=json)
    else:
        plan.measure()
