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
    from demerge.statistics.examples import Collected
    from demerge.statistics.fisher import range_fisher
    from demerge.statistics.gram import range_gram
    from demerge.statistics.options import StatisticsOptions
    from demerge.statistics.planning import StatisticsPlan, plan
    from demerge.statistics.record import commit_statistic, inputs_of

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

__all__ = [
    "Collected",
    "StatisticsOptions",
    "StatisticsPlan",
    "commit_statistic",
    "inputs_of",
    "plan",
    "range_fisher",
    "range_gram",
]
__getattr__, __dir__ = lazily(__name__, HOMES)
