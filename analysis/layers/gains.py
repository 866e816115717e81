"""Which layers gain from experts on ranges, per parameter, and how far a ranking of them is to be believed.

The first-order gain of decoupling, J = sum_R w_R |gbar_R|^2 - |gbar|^2, is a sum over layers l of

    J_l = sum_R w_R |gbar_R,l - gbar_l|^2 = sum_R |z_R,l|^2,    z_R,l = sqrt(w_R) (gbar_R,l - gbar_l),

a square, so that noise adds to it: products of unlike groups are taken, P_l[m, n] = sum_R <z_R,l^m, z_R,l^n>, m != n, whose
expectation is J_l for shared and for independent draws. They come from the map's sketches of layers, whose signs add an error
of about sqrt(2/509) |z|^2 to layers of more than 509 parameters. In the metric `adam` it is the gain of steps as Adam takes
them.

A ranking by J_l / parameters follows noise too. So it is made on half of the groups, A, and judged on the other half, B:

    gain(s) = sum over (A, B) of J_l^B of the layers that J^A takes for the share s  /  sum over (A, B) of J_l^B of all

where layers are taken in their order, each that still fits into a share s of the parameters. The same is asked of two orders
that do not look at the map, smallest layers first (`size`) and random ones (`random`, the mean of 64, drawn once). Errors of
J_l and J are those of similarity.py, errors of held-out gains the jackknife's over groups, of the whole procedure. A ranking
is supported where J is resolved and the layers it takes gain more than 0 and more than random ones, all beyond a 95 %
interval; else all layers are to be trained.

Held against training, on a digits UNet after 120 steps from a random start: 8 groups of layers were trained alone for 20 steps,
four experts and a joint model; J of a group against what its experts' losses are below the joint model's has a rank correlation
of 0.88 (0.98 per parameter; size against the same gain 0.40). 40 steps on the 10 % it ranks first took 5, 5, 20 and 33 % off
the held-out losses of four ranges, on all parameters 7, 6, 19 and 31 %, on random 10 % 3, 4, 13 and 23 %. At a converged base
the gain of most ranges is less than what a short training loses to its own noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demerge.analysis.partitioning.bootstrap import Estimate
from demerge.analysis.partitioning.objective import cover
from demerge.analysis.similarity import cross, error, halves, standard_error, t_quantile, weighted
from demerge.conflict import Array, ConflictMap, layer_widths, layers_of
from demerge.errors import InputError, UsageError
from demerge.randomness import generator
from demerge.storage.atomic import commit_bytes
from demerge.storage.safetensors_header import format_of
from demerge.timesteps import Partition

FORMAT = "demerge.layers/1"
ORDERS = ("ranked", "size", "random")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
RANDOM = 64
PLOTS = (".svg", ".png")
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class LayerGains:
    """What each layer gains from experts on the ranges of a partition.

    Attributes:
        names: the layers, modules of the base, [L].
        sizes: how many parameters each has, [L].
        products: P, [L M M].
        seed: of halves and random orders.
    """

    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    products: Array
    seed: int

    @classmethod
    def of(cls, map: ConflictMap, partition: Partition) -> LayerGains:
        """Take the products of every layer.

        Raises:
            InputError: where the map has no sketches of layers.
            UsageError: where the partition has one range, another number of timesteps, or a range without a whole bin.
        """
        if map.layers is None:
            raise InputError(
                "the map has no sketches of layers",
                fix="measure it with `demerge analyze --layers`",
            )
        sizes, apart = layers_of(map.layout), _apart(map, partition)
        products, column = [], 0
        for width in layer_widths(map.layout):
            z = np.tensordot(apart, map.layers[..., column : column + width].astype(np.float64), 1)
            products.append(np.einsum("rmk,rnk->mn", z, z, optimize=True))
            column += width
        return cls(
            tuple(sizes), np.array(list(sizes.values())), np.stack(products), map.origin.seed
        )

    @property
    def M(self) -> int:
        """The number of groups."""
        return int(self.products.shape[1])

    def gains(self, pairs: Array) -> Array:
        """Return J_l [* L] from weights on pairs of groups [* M M]."""
        sums = np.tensordot(pairs, self.products, ((-2, -1), (-2, -1)))
        gains: Array = sums / pairs.sum((-2, -1))[..., None]
        return gains

    def without_pair(self) -> Array:
        """Return J_l without one pair of groups, for each, [P L]."""
        each = self.products[:, *np.triu_indices(self.M, 1)].T
        left: Array = (each.sum(0) - each) / (len(each) - 1)
        return left

    def total(self) -> Estimate:
        """Return J, the gain of all layers."""
        everything = float(self.gains(cross(self.M)).sum())
        return Estimate(everything, float(error(self.without_pair().sum(1)).se))

    def resolved(self) -> bool:
        """Whether the 95 % interval of J lies above 0."""
        return bool(self.total().value > error(self.without_pair().sum(1)).half())

    def ranking(self, gains: Array) -> Indices:
        """Return the layers in the order of their gain per parameter [* L], from gains [* L]."""
        return np.argsort(-gains / self.sizes, axis=-1, kind="stable")

    def taken(self, orders: Indices, shares: Sequence[float]) -> NDArray[np.bool_]:
        """Return which layers are taken from each order [* L], each that still fits, for shares of the parameters, [* C L]."""
        budgets = np.floor(np.asarray(shares) * self.sizes.sum() + 1e-9)
        used = np.zeros((*orders.shape[:-1], len(budgets)))
        chosen = np.zeros((*used.shape, len(self.sizes)), dtype=bool)
        for place in np.moveaxis(orders, -1, 0):
            size = self.sizes[place][..., None]
            fits = used + size <= budgets
            used += size * fits
            np.put_along_axis(
                chosen,
                np.broadcast_to(place[..., None, None], (*used.shape, 1)),
                fits[..., None],
                -1,
            )
        return chosen


def _apart(map: ConflictMap, partition: Partition) -> Array:
    """Return the map from gradients of bins to z, [R N]."""
    if partition.total != map.T:
        raise UsageError(
            f"the partition covers {partition.total} timesteps, the map {map.T}",
            fix="make it with this base",
        )
    if len(partition) == 1:
        raise UsageError(
            "one range decouples nothing", fix="give two or more, for example --ranges uniform:4"
        )
    shares = cover(map, partition)
    for span, whole in zip(partition, (shares == 1).any(1), strict=True):
        if not whole:
            raise UsageError(
                f"the range {span} holds no whole bin of the map, which has {map.N}",
                fix="give wider ranges, or measure more bins with `demerge analyze --bins`",
            )
    u = shares * map.widths
    weights = u.sum(1, keepdims=True)
    apart: Array = np.sqrt(weights) * (u / weights - map.widths)
    return apart


# -- held out ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutLayers:
    """Gains of the layers that each order takes, as shares of that of all, on groups that did not rank them.

    Attributes:
        shares: of the parameters, ascending, [C].
        gains: by order, of all groups and then without each, [1+M C].
    """

    shares: tuple[float, ...]
    gains: dict[str, Array]

    @classmethod
    def of(cls, layers: LayerGains, shares: Sequence[float]) -> HeldOutLayers:
        """Rank on halves of the groups, judge on the others."""
        everyone = list(range(layers.M))
        kept = [everyone, *([g for g in everyone if g != m] for m in everyone)]
        fixed = {
            "size": np.argsort(layers.sizes, kind="stable")[None],
            "random": _random_orders(layers),
        }
        taken = {name: layers.taken(orders, shares).mean(0) for name, orders in fixed.items()}
        rows: dict[str, list[Array]] = {name: [] for name in ORDERS}
        for groups in kept:
            ranked, judged = (
                layers.gains(weighted(half)) for half in halves(groups, layers.M, layers.seed)
            )
            found = layers.taken(layers.ranking(ranked), shares)
            rows["ranked"].append(np.einsum("scl,sl->c", found, judged) / judged.sum())
            for name, which in taken.items():
                rows[name].append(which @ judged.sum(0) / judged.sum())
        return cls(tuple(shares), {name: np.stack(row) for name, row in rows.items()})

    def estimate(self, order: str, share: float, against: str | None = None) -> Estimate:
        """Return the gain of an order at a share, or by how much it exceeds that of another order."""
        column = self.shares.index(share)
        values = self.gains[order][:, column]
        if against is not None:
            values = values - self.gains[against][:, column]
        return Estimate(float(values[0]), float(standard_error(values[1:])))


def _random_orders(layers: LayerGains) -> Indices:
    stream = generator(layers.seed, "analysis-layers")
    return np.stack([stream.permutation(len(layers.sizes)) for _ in range(RANDOM)])


# -- the result ----------------------------------------------------------------------------------------------------------


def layers(map: ConflictMap, partition: Partition, *, share: float = 0.1) -> dict[str, Any]:
    """Say which layers to train for experts on the ranges of a partition, and why: JSON values only, as in layers.json.

    Args:
        share: of the map's parameters that may be trained, in (0, 1].

    Returns `format`, `model` (sha256 of the base), `metric`, `groups`, `ranges`, `share`; `total`, J; `layers` with their
    `name`, `parameters`, `gain` and `se`, by gain per parameter; `curve`, held-out shares of the gain by order, empty where J
    is not resolved; `supported` and its `reason`; `train`, the names of the layers to train (all where nothing is supported),
    and `trained`, their parameters' share.

    Raises:
        InputError: where the map has no sketches of layers.
        UsageError: where the share is not in (0, 1] or too small for any layer, or the partition does not fit the map.
    """
    if not 0 < share <= 1:
        raise UsageError(f"share {share:g} is not in (0, 1]", fix="for example --share 0.1")
    found = LayerGains.of(map, partition)
    gains, errors = found.gains(cross(map.M)), error(found.without_pair()).se
    order = found.ranking(gains)
    (chosen,) = found.taken(order, [share])
    if not chosen.any():
        raise UsageError(
            f"no layer fits into {share:g} of {found.sizes.sum():,} parameters",
            fix=f"give --share {found.sizes.min() / found.sizes.sum():.1g} or more",
        )
    held_out = HeldOutLayers.of(found, sorted({*SHARES, share})) if found.resolved() else None
    supported, reason = _verdict(held_out, share, map.M)
    train = [found.names[i] for i in order if chosen[i] or not supported]
    trained = found.sizes[chosen].sum() if supported else found.sizes.sum()
    return {
        "format": FORMAT,
        "model": map.origin.model,
        "metric": map.origin.metric,
        "groups": map.M,
        "ranges": [[span.start, span.stop] for span in partition],
        "share": share,
        "total": _number(found.total()),
        "layers": [
            {
                "name": found.names[i],
                "parameters": int(found.sizes[i]),
                "gain": _short(gains[i]),
                "se": _short(errors[i]),
            }
            for i in order
        ],
        "curve": _curve(held_out),
        "supported": supported,
        "reason": reason,
        "train": train,
        "trained": _short(trained / found.sizes.sum()),
    }


def _verdict(held_out: HeldOutLayers | None, share: float, M: int) -> tuple[bool, str]:
    """Say whether a ranking is supported at a share, and why."""
    if held_out is None:
        return False, "no conflict between these ranges is resolved"
    if share == 1:
        return False, "a share of 1 leaves nothing to choose"
    gain, more = held_out.estimate("ranked", share), held_out.estimate("ranked", share, "random")
    if not gain.above(t_quantile(M)):
        return (
            False,
            f"held out, the ranked layers gain {_percent(gain)} of all, which is not distinguishable from 0",
        )
    if not more.above(t_quantile(M)):
        return (
            False,
            f"held out, ranked layers gain {_percent(more)} of all more than random ones, which is not distinguishable",
        )
    return (
        True,
        f"held out, they gain {_percent(gain)} of what all layers gain, {_percent(more)} more than random ones",
    )


def _percent(found: Estimate) -> str:
    return f"{100 * found.value:.0f} ± {100 * found.se:.0f} %"


def _curve(held_out: HeldOutLayers | None) -> list[dict[str, Any]]:
    if held_out is None:
        return []
    return [
        {"share": share, **{order: _number(held_out.estimate(order, share)) for order in ORDERS}}
        for share in held_out.shares
    ]


def _number(found: Estimate) -> dict[str, float]:
    return {"value": _short(found.value), "se": _short(found.se)}


def _short(value: float) -> float:
    return float(f"{value:.6g}")


# -- files ---------------------------------------------------------------------------------------------------------------


def check_replaceable(out: Path | None, plot: Path | None) -> None:
    """Refuse places for a choice and its plot that hold something else, or cannot be drawn.

    Raises:
        UsageError: naming it.
    """
    if plot is not None and (plot.suffix not in PLOTS or plot.is_dir()):
        raise UsageError(
            f"plot {plot} is neither .svg nor .png",
            fix="name a file, for example --plot layers.svg",
        )
    if out is not None and out.exists() and format_of(out) != FORMAT:
        raise UsageError(
            f"{out} is there and is not a choice of layers",
            fix="name another file, for example layers.json",
        )


def draw(said: dict[str, Any], path: Path) -> Path:
    """Draw what `layers` says into a .svg or .png."""
    from demerge.analysis.layers.plots import gain_by_layer
    from demerge.reporting.theme import render

    picture = render(gain_by_layer(said), path.suffix[1:])
    return commit_bytes(path, picture)


# -- for a person --------------------------------------------------------------------------------------------------------


def lines(said: dict[str, Any], top: int = 10) -> list[str]:
    """Return what `layers` says, for a person: the first layers, the curve, and what to train at the end."""
    measured = sum(row["parameters"] for row in said["layers"])
    total = Estimate(**said["total"])
    head = f"{'gain, % of all':>16}  {'parameters':>10}  layer"
    scale = 100 / total.value if total.value > 0 else 0.0
    first = [
        f"{scale * row['gain']:8.2f} ± {scale * row['se']:5.2f}  {row['parameters']:10,}  {row['name']}"
        for row in said["layers"][:top]
    ]
    few = said["supported"]
    count = f"{len(said['train'])} of {len(said['layers'])} layers, {said['trained']:.1%} of {measured:,} parameters"
    return [
        f"{'gain':12}  {total.value:.4g} ± {total.se:.2g} in {len(said['ranges'])} ranges, {said['metric']} metric",
        *(
            []
            if said["metric"] == "adam"
            else [f"{'note':12}  finetuning steps by Adam: a map in --metric adam ranks for that"]
        ),
        *([head, *first] if few else []),
        *_table(said["curve"], said["share"]),
        *([] if few else [f"{'ranking':12}  no ranking is supported: train all layers"]),
        f"{'reason':12}  {said['reason']}",
        f"{'train':12}  {count}",
    ]


def _table(curve: list[dict[str, Any]], chosen: float) -> list[str]:
    if not curve:
        return []
    head = (
        f"{'trained':>12}  "
        + "  ".join(f"{order:>13}" for order in ORDERS)
        + "   of the gain of all layers, held out"
    )
    return [
        head,
        *(
            f"{row['share']:12.0%}  "
            + "  ".join(f"{row[order]['value']:6.2f} ± {row[order]['se']:.2f}" for order in ORDERS)
            + ("   <" if row["share"] == chosen else "")
            for row in curve
        ),
    ]
