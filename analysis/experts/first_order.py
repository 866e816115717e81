"""What each expert does to the loss of each range, predicted from a stored map to first order.

    L_R(theta_0 + tau_n) - L_R(theta_0) = <gbar_R, tau_n> + O(|tau_n|^2)
    gbar_R = sum_{i in R} w_i mu_i / w_R,     tau_n = theta_n - theta_0
    <s_i^m, tau_n> = <h(s_i^m), h(tau_n)>     up to the sketch

The sketch h(tau_n) has the signs of the map's. It is made in one pass over the checkpoints, a
tensor at a time; neither the model nor its data is loaded. A range that ends within a bin takes the
gradient as constant there.

The product is linear in the gradients, so its mean over groups is unbiased, however the bins share
draws. SE is the jackknife's over the M groups. The signs are the same in all groups, so their part
does not show in SE; it is

    sketch = sqrt(2/k) |gbar_R| |tau_n|      at most, and 0 if every coordinate is kept (k >= D)

with |gbar_R|^2 by pairs of different groups plus one SE of its own, so that a gradient that noise
hides does not count as 0. What the sketch adds to the noise of a group is in SE. The half width of
the 95 % interval is t_{M-1} sqrt(SE^2 + sketch^2). A cell whose interval covers 0 is not resolved.

It is exact for a short task vector only; along a long one the loss bends, near a minimum upwards.
docs/studies.md compares it with measured changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demerge.analysis.experts.sketched import Model, SketchedVectors, sketch_vectors
from demerge.analysis.partitioning.objective import cover
from demerge.analysis.similarity import (
    all_cross_pairs,
    leave_one_out,
    pair_weighted_gram,
    standard_error,
    t_quantile,
)
from demerge.conflict import Array, ConflictMap, Sketches, layer_widths, layers_of
from demerge.errors import InputError
from demerge.progress import Progress, silent
from demerge.timesteps import Partition


@dataclass(frozen=True, slots=True, eq=False)
class Products:
    """Inner products of mean gradients with task vectors, [*], from M groups."""

    value: Array  # <gbar, tau>
    se: Array  # the jackknife's error over groups
    sketch: Array  # the error that the sketch adds to it
    M: int

    @property
    def half(self) -> Array:
        """The half width of the 95 % interval, [*]."""
        half: Array = t_quantile(self.M) * np.hypot(self.se, self.sketch)
        return half

    @property
    def resolved(self) -> NDArray[np.bool_]:
        """Whether the interval leaves 0 out, [*]."""
        return np.asarray(abs(self.value) > self.half)

    def __getitem__(self, index: Any) -> Products:
        """Return some of them."""
        return Products(self.value[index], self.se[index], self.sketch[index], self.M)

    def document(self) -> dict[str, Any]:
        """Return them as JSON values: numbers, or lists of the same shape."""
        values = {"change": self.value, "se": self.se, "sketch": self.sketch}
        arrays = {**values, "half": self.half, "resolved": self.resolved}
        return {name: array.tolist() for name, array in arrays.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """The predicted changes of R losses by K experts."""

    names: tuple[str, ...]  # of the experts, K
    ranges: Partition  # of timesteps, R
    changes: Products  # of each range, [K R]
    total: Products  # of all timesteps, [K]
    norms: Array  # |tau_n| on the map's coordinates, [K]
    outside: Array  # the share of |tau_n|^2 on coordinates that the map does not have, [K]
    layers: tuple[str, ...] = ()  # names of the L layers, empty if the map has no sketches of them
    by_layer: Products | None = None  # what each layer adds to the changes, [K L R]


def predict_transfer(
    map: ConflictMap,
    base: Model,
    experts: Sequence[Model],
    ranges: Partition,
    *,
    names: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Transfer:
    """Predict the change of the loss of each range by each expert's task vector.

    Args:
        map: of the base, with sketches, in the Euclidean metric.
        base: its tensors, by name; lazy mappings are read a tensor at a time.
        experts: state dicts of the base's names, or the deltas of a LoRA (`demerge.lora.Adapter`).
        names: of the experts; their numbers by default.

    Raises:
        InputError: if the map has no sketches or is in another metric, base, experts and map do not
            fit each other, or a value is not finite.
    """
    labels = tuple(str(k) for k in range(len(experts))) if names is None else tuple(names)
    sketches = sketches_of(map)
    vectors = sketch_vectors(map, base, experts, labels, progress)
    shares = np.vstack([cover(map, ranges), np.ones(map.N)]) * map.widths
    weights = shares / shares.sum(1, keepdims=True)
    whole = _products(map, sketches, weights, vectors)
    layers = () if map.layers is None else tuple(layers_of(map.layout))
    by_layer = None if map.layers is None else _by_layer(map, map.layers, weights[:-1], vectors)
    norms = np.sqrt(vectors.squares.sum(1))
    total = norms**2 + vectors.outside
    outside = np.divide(vectors.outside, total, out=np.zeros_like(total), where=total > 0)
    return Transfer(labels, ranges, whole[:, :-1], whole[:, -1], norms, outside, layers, by_layer)


def sketches_of(map: ConflictMap) -> Sketches:
    """Return a map's sketches of gradients, [N M k]."""
    if map.sketches is None:
        what = "the map holds no sketches of gradients"
        raise InputError(what, fix="measure it again with this version's `demerge analyze`")
    if map.origin.metric != "euclid":
        what = f"the map is in the {map.origin.metric} metric: its sketches are of scaled gradients"
        raise InputError(what, fix="measure a map with `demerge analyze --metric euclid`")
    return map.sketches


def _products(
    map: ConflictMap, sketches: Sketches, weights: Array, vectors: SketchedVectors
) -> Products:
    """Return <gbar_r, tau_n> [K R] for weights of the bins [R N]."""
    each = np.stack([rows.astype(np.float64) @ vectors.sketch.T for rows in sketches])
    square = _squares(pair_weighted_gram(map, all_cross_pairs(map.M)), weights)
    square = square + standard_error(_squares(leave_one_out(map), weights))
    kept, D = sketches.shape[-1], map.origin.parameters
    factor = np.sqrt(2 / kept) if kept < D else 0.0
    lengths = np.sqrt(vectors.squares.sum(1))
    error = factor * np.outer(lengths, np.sqrt(square.clip(min=0)))
    return _estimate(np.einsum("ri,imn->mnr", weights, each), error)


def _squares(K: Array, weights: Array) -> Array:
    """Return |gbar_r|^2 [* R] of K [* N N] for weights of the bins [R N]."""
    return np.asarray(np.einsum("ri,...ij,rj->...r", weights, K, weights, optimize=True))


def _by_layer(
    map: ConflictMap, layers: Sketches, weights: Array, vectors: SketchedVectors
) -> Products:
    """Return the part of <gbar_r, tau_n> on each layer, [K L R]."""
    sizes = np.array(list(layers_of(map.layout).values()))
    kept = np.array(layer_widths(map.layout))
    starts, M = np.cumsum(kept) - kept, map.M
    each, squares = [], []
    for row in weights:
        gradient = np.einsum("i,imw->mw", row, layers)
        own, total = gradient**2, gradient.sum(0)
        every = np.add.reduceat(total**2 - own.sum(0), starts) / (M * (M - 1))
        rest = (total - gradient) ** 2 - (own.sum(0) - own)
        left_out = np.add.reduceat(rest, starts, axis=-1) / ((M - 1) * (M - 2))
        squares.append(every + standard_error(left_out))  # by pairs of groups, plus one SE
        each.append([np.add.reduceat(gradient * tau, starts, axis=-1) for tau in vectors.layers])
    factor = np.where(kept < sizes, np.sqrt(2 / kept), 0.0)
    lengths = factor * np.sqrt(vectors.squares)
    error = lengths[:, :, None] * np.sqrt(np.stack(squares, 1).clip(min=0))
    return _estimate(np.einsum("rnml->mnlr", np.array(each)), error)


def _estimate(each: Array, sketch: Array) -> Products:
    """Return the mean over groups [*] of values of each [M *], with the jackknife's error."""
    M = len(each)
    return Products(each.mean(0), standard_error((each.sum(0) - each) / (M - 1)), sketch, M)
