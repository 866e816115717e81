"""What an expert's range says about its weights, for the merge methods that use data.

    F [*]     = E[g^2]     g the gradient of the range's loss, per example            fisher.safetensors, for `fisher`
    G [in in] = E[x x^T]   x the input of a linear layer or a 1 x 1 convolution       gram.safetensors, for `regmean`

`examples` draws what both are measured on, `fisher` and `gram` measure, `record` puts them beside an expert or into a
folder, `run` is the stage that `demerge stats` runs.
"""

from demerge.statistics.examples import Collected
from demerge.statistics.fisher import range_fisher
from demerge.statistics.gram import range_gram
from demerge.statistics.planning import Plan, prepare
from demerge.statistics.record import commit_statistic, inputs_of

__all__ = [
    "Collected",
    "Plan",
    "commit_statistic",
    "inputs_of",
    "prepare",
    "range_fisher",
    "range_gram",
]
