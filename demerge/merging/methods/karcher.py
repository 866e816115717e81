"""The mean on the sphere: slerp for two task vectors, the weighted Karcher mean for more.

    x_i = tau_i / |tau_i|,  u = argmin_{|u| = 1} sum_i w_i angle(u, x_i)^2
    theta = theta_0 + lambda l u,  l = sum_i w_i |tau_i| / sum_i w_i

found by u <- exp_u(sum_i w_i log_u(x_i)), Karcher's iteration (Riemannian center of mass, CPAM 30,
1977). It works on task vectors: the weights of finetunes of one base are all but parallel, so that
their mean on the sphere is the plain mean. u lies in the span of the x_i, so its coefficients a
follow from the cosines c between them, and the result is a weighted sum:

    u = sum_i a_i x_i, cos(u, x_i) = (c a)_i, theta = theta_0 + lambda sum_i (l a_i / |tau_i|) tau_i

`norm` is how lengths are merged: their `mean`, their `geometric` mean, or `own`: theta = theta_0 +
lambda sum_i a_i tau_i (slerp without normalising). A negative weight turns its task vector round. A
task vector of 0 has no direction and counts for the length alone. Opposite directions of equal
weight have no mean: the base stays; an expert opposite to the mean of the others does not move it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from demerge.merging.method_options import Between
from demerge.merging.methods.linear import weighted_sum
from demerge.merging.methods.shared.geometry import cosines, gram, norms
from demerge.merging.registry import Blocks, Statistic, method

OPPOSITE = 1e-6  # a mean of unit vectors as short as this is noise, not a direction
SHORT = 1e-30  # of the longest: a task vector as short as this counts as 0


def direction(c: Tensor, w: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Return the coefficients a [K] of the mean direction for cosines c [K K], weights w >= 0 [K].

    They are 0 if there is no direction.
    """
    a = _unit(w, c)
    for _ in range(iterations):
        cosine = (c @ a).clamp(-1, 1)
        angle = cosine.arccos()
        sine = angle.sin()
        apart = (sine > OPPOSITE) & (w > 0)
        near = torch.where(cosine > 0, w, 0.0)
        pull = torch.where(apart, w * angle / torch.where(apart, sine, 1.0), near)
        tangent = pull - (pull * cosine).sum() * a
        length = _length(tangent, c)
        if length <= tolerance:
            break
        a = _unit(length.cos() * a + torch.sinc(length / torch.pi) * tangent, c)
    return a


def _length(a: Tensor, c: Tensor) -> Tensor:
    return (a @ c @ a).clamp_min(0).sqrt()


def _unit(a: Tensor, c: Tensor) -> Tensor:
    length = _length(a, c)
    return a / length if length > OPPOSITE else torch.zeros_like(a)


def coefficients(
    blocks: Blocks, *, weights: Tensor, gram: Tensor, norm: str, iterations: int, tolerance: float
) -> Tensor:
    """Return the coefficients [K] of the task vectors in the merged one, from their Gram matrix."""
    sign, w = weights.double().sign(), weights.double().abs()
    w = w / torch.where(w.sum() > 0, w.sum(), 1.0)
    lengths = norms(gram)
    lengths = torch.where(lengths > SHORT * lengths.amax(), lengths, 0.0)
    directed = torch.where(lengths > 0, w, 0.0)
    directed = directed / torch.where(directed.sum() > 0, directed.sum(), 1.0)
    c = cosines(gram) * sign * sign.unsqueeze(1)
    a = sign * direction(c, directed, iterations, tolerance)
    if norm == "own":
        return a
    length = (w * lengths).sum() if norm == "mean" else lengths.pow(w).prod()
    return length * a / torch.where(lengths > 0, lengths, 1.0)


@method(
    "slerp",
    paper="Karcher 1977; Shoemake 1985",
    aliases=("karcher",),
    statistics=(
        Statistic("gram", gram, lambda o: o["scope"], uses_weights=False),
        Statistic("coefficient", coefficients),
    ),
)
def karcher(
    base: Tensor,
    deltas: Tensor,
    *,
    coefficient: Tensor,
    norm: Literal["mean", "geometric", "own"] = "mean",
    scope: Literal["tensor", "model"] = "tensor",
    iterations: Annotated[int, Between(0, 10_000)] = 100,
    tolerance: Annotated[float, Between(0, 1)] = 1e-12,
    scale: float = 1.0,
) -> Tensor:
    """Average the directions of the task vectors on the sphere, and their lengths [*].

    Weights are relative.

    Args:
        norm: how lengths are merged: their mean, their geometric mean, or not
        scope: whether angles are measured over each tensor or the model
        iterations: most steps of the search for the mean direction
        tolerance: step, in radians, at which the search stops
    """
    return base + weighted_sum(deltas, (scale * coefficient).to(base.dtype))
