"""Which layers gain from experts on ranges, per parameter, and how far their ranking is right.

The first-order gain of decoupling, J = sum_R w_R |gbar_R|^2 - |gbar|^2, is a sum over layers l of

    J_l = sum_R w_R |gbar_R,l - gbar_l|^2 = sum_R |z_R,l|^2
    z_R,l = sqrt(w_R) (gbar_R,l - gbar_l),

a square, so that noise adds to it. Therefore products of unlike groups are taken, P_l[m, n] =
sum_R <z_R,l^m, z_R,l^n>, m != n, whose expectation is J_l for shared and for independent draws.
They come from the map's sketches of layers, whose signs add an error of about sqrt(2/509) |z|^2 to
layers of more than 509 parameters. In the metric `adam` it is the gain of steps as Adam takes them.

A ranking by J_l / parameters follows noise too. So it is made on half of the groups, A, and judged
on the other half, B:

    gain(s) = sum over (A, B) of J_l^B of the layers that J^A takes for the share s
              / sum over (A, B) of J_l^B of all

Layers are taken in their order, each that still fits into a share s of the parameters. The same is
done for two orders that do not look at the map: smallest layers first (`size`) and random ones
(`random`, the mean of 64, drawn once). Errors of J_l and J are those of similarity.py. Errors of
held-out gains are the jackknife's over groups, of the whole procedure. A ranking is supported if J
is resolved and the layers it takes gain more than 0 and more than random ones, all beyond a 95 %
interval. Else all layers are to be trained.
docs/studies.md compares the ranking with training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demerge.analysis.partitioning.objective import cover
from demerge.analysis.similarity import (
    Estimate,
    all_cross_pairs,
    estimate_error,
    estimate_table,
    group_weights_to_pairs,
    halves,
    standard_error,
    t_quantile,
)
from demerge.conflict import Array, ConflictMap, layer_widths, layers_of
from demerge.errors import InputError, UsageError
from demerge.randomness import generator
from demerge.timesteps import Partition

FORMAT = "demerge.layers/1"
ORDERS = ("ranked", "size", "random")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
RANDOM = 64
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class LayerGains:
    """What each layer gains from experts on the ranges of a partition."""

    names: tuple[str, ...]  # the layers, modules of the base, [L]
    sizes: NDArray[np.int64]  # how many parameters each has, [L]
    products: Array  # P, [L M M]
    seed: int  # of halves and random orders

    @classmethod
    def of(cls, map: ConflictMap, partition: Partition) -> LayerGains:
        """Take the products of every layer."""
        if map.layers is None:
            what = "the map has no sketches of layers"
            raise InputError(what, fix="measure it with `demerge analyze --layers`")
        sizes, apart = layers_of(map.layout), _apart(map, partition)
        products, column = [], 0
        for width in layer_widths(map.layout):
            z = np.tensordot(apart, map.layers[..., column : column + width].astype(np.float64), 1)
            products.append(np.einsum("rmk,rnk->mn", z, z, optimize=True))
            column += width
        counts = np.array(list(sizes.values()))
        return cls(tuple(sizes), counts, np.stack(products), map.origin.seed)

    @property
    def M(self) -> int:
        """The number of groups."""
        return int(self.products.shape[1])

    def gains(self, pairs: Array) -> Array:
        """Return J_l [* L] from weights on pairs of groups [* M M]."""
        sums = np.tensordot(pairs, self.products, ((-2, -1), (-2, -1)))
        return np.asarray(sums / pairs.sum((-2, -1))[..., None])

    def without_pair(self) -> Array:
        """Return J_l without one pair of groups, for each, [P L]."""
        each = self.products[:, *np.triu_indices(self.M, 1)].T
        return np.asarray((each.sum(0) - each) / (len(each) - 1))

    def rank(self, gains: Array) -> Indices:
        """Return the layers in the order of their gain per parameter [* L], from gains [* L]."""
        return np.argsort(-gains / self.sizes, axis=-1, kind="stable")

    def take(self, orders: Indices, shares: Sequence[float]) -> NDArray[np.bool_]:
        """Return which layers are taken from orders [* L], each that still fits, [* C L]."""
        budgets = np.floor(np.asarray(shares) * self.sizes.sum() + 1e-9)
        used = np.zeros((*orders.shape[:-1], len(budgets)))
        chosen = np.zeros((*used.shape, len(self.sizes)), dtype=bool)
        for place in np.moveaxis(orders, -1, 0):
            size = self.sizes[place][..., None]
            fits = used + size <= budgets
            used += size * fits
            columns = np.broadcast_to(place[..., None, None], (*used.shape, 1))
            np.put_along_axis(chosen, columns, fits[..., None], -1)
        return chosen


def _apart(map: ConflictMap, partition: Partition) -> Array:
    """Return the map from gradients of bins to z, [R N]."""
    if len(partition) == 1:
        fix = "give two or more, for example --ranges uniform:4"
        raise UsageError("one range decouples nothing", fix=fix)
    shares = cover(map, partition)
    for span, has_whole_bin in zip(partition, (shares == 1).any(1), strict=True):
        if not has_whole_bin:
            what = f"the range {span} holds no whole bin of the map, which has {map.N}"
            fix = "give wider ranges, or measure more bins with `demerge analyze --bins`"
            raise UsageError(what, fix=fix)
    u = shares * map.widths
    weights = u.sum(1, keepdims=True)
    return np.asarray(np.sqrt(weights) * (u / weights - map.widths))


def held_out_gains(layers: LayerGains, shares: Sequence[float]) -> dict[str, Array]:
    """Return what layers gain, as shares of all, on halves of the groups that did not rank them.

    Returns for each order the gains of all groups and then without each, [1+M C].
    """
    everyone, stream = list(range(layers.M)), generator(layers.seed, "analysis-layers")
    fixed = {
        "size": np.argsort(layers.sizes, kind="stable")[None],
        "random": np.stack([stream.permutation(len(layers.sizes)) for _ in range(RANDOM)]),
    }
    taken = {name: layers.take(orders, shares).mean(0) for name, orders in fixed.items()}
    rows: dict[str, list[Array]] = {name: [] for name in ORDERS}
    for left_out in (None, *everyone):
        groups = [g for g in everyone if g != left_out]
        ranked, judged = (
            layers.gains(group_weights_to_pairs(half))
            for half in halves(groups, layers.M, layers.seed)
        )
        chosen = layers.take(layers.rank(ranked), shares)
        rows["ranked"].append(np.einsum("scl,sl->c", chosen, judged) / judged.sum())
        for name, which in taken.items():
            rows[name].append(which @ judged.sum(0) / judged.sum())
    return {name: np.stack(row) for name, row in rows.items()}


def _estimate(values: Array) -> Estimate:
    """Return an estimate from its value and then those without each group, [1+M]."""
    return Estimate(float(values[0]), float(standard_error(values[1:])))


@dataclass(frozen=True, slots=True)
class LayerGain:
    """One layer: its parameters, its gain J_l and the standard error of it."""

    name: str
    parameters: int
    gain: float
    se: float


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """Which layers to train for experts on the ranges of a partition, and why."""

    model: str  # sha256 of the base
    metric: str
    groups: int  # the number of groups of the map
    partition: Partition
    share: float  # of the parameters that may be trained
    total: Estimate  # J
    layers: tuple[LayerGain, ...]  # by gain per parameter
    curve: Mapping[float, Mapping[str, Estimate]]  # held-out shares, empty if J is unresolved
    is_supported: bool
    reason: str
    train: tuple[str, ...]  # names of the layers to train; all if no ranking is supported
    trained: float  # their share of the parameters

    def document(self) -> dict[str, Any]:
        """Return the content of layers.json."""
        ranges = [[span.start, span.stop] for span in self.partition]
        layers, curve = [asdict(layer) for layer in self.layers], list[dict[str, Any]]()
        for share, row in self.curve.items():
            curve.append({"share": share, **{order: asdict(gain) for order, gain in row.items()}})
        origin = {"model": self.model, "metric": self.metric, "groups": self.groups}
        gains = {"share": self.share, "total": asdict(self.total), "layers": layers, "curve": curve}
        choice = {"supported": self.is_supported, "reason": self.reason, "train": list(self.train)}
        document = {"format": FORMAT, **origin, "ranges": ranges, **gains, **choice}
        return {**document, "trained": self.trained}

    def lines(self, top: int = 10) -> list[str]:
        """Return what to train and why, the first layers, and the curve."""
        parameters = sum(layer.parameters for layer in self.layers)
        share = f"{self.trained:.1%} of {parameters:,} parameters"
        verdict = f"train {len(self.train)} of {len(self.layers)} layers, {share}"
        if not self.is_supported:
            verdict = f"no ranking is supported: train all layers, {share}"
        total = f"{self.total.value:.4g} ± {self.total.se:.2g}"
        lines = [
            verdict,
            f"{'reason':12}  {self.reason}",
            f"{'gain':12}  {total} in {len(self.partition)} ranges, {self.metric} metric",
        ]
        if self.metric != "adam":
            lines.append(f"{'note':12}  finetuning uses Adam: rank by a map in --metric adam")
        if self.is_supported:
            lines.append(f"{'gain, % of all':>16}  {'parameters':>10}  layer")
            for layer in self.layers[:top]:
                gain, se = (100 * value / self.total.value for value in (layer.gain, layer.se))
                lines.append(f"{gain:8.2f} ± {se:5.2f}  {layer.parameters:10,}  {layer.name}")
        rows = {f"{share:.0%}": row for share, row in self.curve.items()}
        caption = "of the gain of all layers, held out"
        return [*lines, *estimate_table("trained", rows, f"{self.share:.0%}", caption)]


def choose_layers(map: ConflictMap, partition: Partition, *, share: float = 0.1) -> LayerChoice:
    """Choose which layers to train for experts on the ranges of a partition.

    Args:
        share: of the map's parameters that may be trained, in (0, 1].

    Raises:
        InputError: if the map has no sketches of layers.
        UsageError: if the share is too small for any layer, or the partition does not fit the map.
    """
    measured = LayerGains.of(map, partition)
    gains, without = measured.gains(all_cross_pairs(map.M)), measured.without_pair()
    errors, error = estimate_error(without).se, estimate_error(without.sum(1))
    total = Estimate(float(gains.sum()), float(error.se))
    order, parameters = measured.rank(gains), measured.sizes.sum()
    (chosen,) = measured.take(order, [share])
    if not chosen.any():
        what = f"no layer fits into {share:g} of {parameters:,} parameters"
        raise UsageError(what, fix=f"give --share {measured.sizes.min() / parameters:.1g} or more")
    curve: dict[float, dict[str, Estimate]] = {}
    is_supported, reason = False, "no conflict between these ranges is resolved"
    if total.value > error.half():
        shares = sorted({*SHARES, share})
        held_out = held_out_gains(measured, shares)
        for column, each in enumerate(shares):
            row = {name: _estimate(rows[:, column]) for name, rows in held_out.items()}
            curve[each] = {name: _short(estimate) for name, estimate in row.items()}
        at_share = {name: rows[:, shares.index(share)] for name, rows in held_out.items()}
        more = _estimate(at_share["ranked"] - at_share["random"])
        is_supported, reason = _verdict(_estimate(at_share["ranked"]), more, share, map.M)
    layers = []
    for i in order:
        gain = _short(Estimate(gains[i], errors[i]))
        layers.append(LayerGain(measured.names[i], int(measured.sizes[i]), gain.value, gain.se))
    trained = measured.sizes[chosen].sum() / parameters if is_supported else 1.0
    return LayerChoice(
        model=map.origin.model,
        metric=map.origin.metric,
        groups=map.M,
        partition=partition,
        share=share,
        total=_short(total),
        layers=tuple(layers),
        curve=curve,
        is_supported=is_supported,
        reason=reason,
        train=tuple(measured.names[i] for i in order if chosen[i] or not is_supported),
        trained=float(f"{trained:.6g}"),
    )


def _verdict(gain: Estimate, more: Estimate, share: float, M: int) -> tuple[bool, str]:
    """Say whether a ranking is supported, and why, by its gain and that over random layers."""
    if share == 1:
        return False, "a share of 1 leaves nothing to choose"
    own, extra = (f"{100 * e.value:.0f} ± {100 * e.se:.0f} %" for e in (gain, more))
    unclear = "which is not distinguishable from 0"
    if not gain.above(t_quantile(M)):
        return False, f"held out, the ranked layers gain {own} of all, {unclear}"
    if not more.above(t_quantile(M)):
        return False, f"held out, ranked layers gain {extra} more than random ones, {unclear}"
    return True, f"held out, they gain {own} of what all layers gain, {extra} more than random ones"


def _short(estimate: Estimate) -> Estimate:
    """Return an estimate with six digits, as layers.json has it."""
    return Estimate(float(f"{estimate.value:.6g}"), float(f"{estimate.se:.6g}"))
