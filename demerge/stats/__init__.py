"""What an expert's range says about its weights, for the merge methods that use data.

    F [*]     = E[g^2]     g the gradient of the range's loss, per example            fisher.safetensors, for `fisher`
    G [in in] = E[x x^T]   x the input of a linear layer or a 1 x 1 convolution       gram.safetensors, for `regmean`

`examples` draws what both are measured on, `fisher` and `gram` measure, `record` puts them beside an expert or into a
folder, `run` is the stage that `demerge stats` runs.
"""

from demerge.stats.examples import Collected
from demerge.stats.fisher import range_fisher
from demerge.stats.gram import range_gram
from demerge.stats.record import commit_statistic, inputs_of
from demerge.stats.run import Plan, prepare

__all__ = ["Collected", "Plan", "commit_statistic", "inputs_of", "prepare", "range_fisher", "range_gram"]
