"""What an expert's range says about its weights, for the merge methods that use data.

    F [*]     = E[g^2]     g the gradient of the range's loss, per example       for `fisher`
    G [in in] = E[x x^T]   x the input of a linear layer or 1 x 1 convolution    for `regmean`

`examples` draws what both are measured on. `fisher` and `gram` measure. `record` reads and writes
fisher.safetensors, gram.safetensors and stats.json. `planning` is the stage of `demerge stats`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from demerge.lazy import lazily

if TYPE_CHECKING:
    from demerge.statistics.examples import Collected as Collected
    from demerge.statistics.fisher import range_fisher as range_fisher
    from demerge.statistics.gram import range_gram as range_gram
    from demerge.statistics.options import StatisticsOptions as StatisticsOptions
    from demerge.statistics.planning import StatisticsPlan as StatisticsPlan
    from demerge.statistics.planning import plan as plan
    from demerge.statistics.record import commit_statistic as commit_statistic
    from demerge.statistics.record import inputs_of as inputs_of

HOMES = {
    "Collected": "examples",
    "StatisticsPlan": "planning",
    "StatisticsOptions": "options",
    "commit_statistic": "record",
    "inputs_of": "record",
    "plan": "planning",
    "range_fisher": "fisher",
    "range_gram": "gram",
}
__all__ = list(HOMES)
__getattr__, __dir__ = lazily(__name__, HOMES)
