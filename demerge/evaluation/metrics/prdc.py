"""Precision, recall, density and coverage: how much of each set of features lies near the other.

B(x) is the ball around x that reaches to its k-th nearest neighbour in its own set. For x real [N]
and y generated [M]:

    precision  share of y that lie in some B(x)                 are the images real?
    recall     share of x that lie in some B(y)                 are all real images covered?
    density    1/(k M) sum_j #{i : y_j in B(x_i)}               precision safe from outliers
    coverage   share of x whose B(x) holds some y               recall safe from outliers

Papers: precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797), whose k =
5 is used for all four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from demerge.errors import UsageError

NEAREST = 5
ROWS = 1024


@dataclass(frozen=True, slots=True)
class Prdc:
    """Precision, recall and coverage in [0, 1]; density >= 0."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Tensor, generated: Tensor, *, k: int = NEAREST, reach: Tensor | None = None) -> Prdc:
    """Return the four numbers for features real [N D] and generated [M D].

    Args:
        reach: `radii(real, k)`, if it is known.
    """
    if min(len(real), len(generated)) <= k:
        what = f"{len(real)} and {len(generated)} images are too few for k = {k}"
        raise UsageError(what, fix=f"give more than {k} of each")
    x, y = real.double(), generated.double()
    reach_x, reach_y = radii(x, k) if reach is None else reach, radii(y, k)
    near_real, in_balls = [], torch.zeros(len(y), dtype=torch.long, device=y.device)
    covered = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        distances = torch.cdist(x[rows], y)
        inside = distances <= reach_x[rows, None]
        in_balls += inside.sum(0)
        covered[rows] = inside.any(1)
        near_real.append((distances <= reach_y).any(1))
    return Prdc(
        precision=float((in_balls > 0).double().mean()),
        recall=float(torch.cat(near_real).double().mean()),
        density=float(in_balls.double().mean() / k),
        coverage=float(covered.double().mean()),
    )


def radii(x: Tensor, k: int) -> Tensor:
    """Return each row's distance [n] to its k-th nearest other row of x [n D]."""
    x = x.double()
    return torch.cat([torch.cdist(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(ROWS)])
