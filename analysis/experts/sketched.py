"""Task vectors as a conflict map's sketches see them: h(tau_n), one of each layer, and the squares that errors need.

Tensors are matched to coordinates by name, as diffusers holds it, so that the order of a file does not matter; the base's
tensors that the map does not have (buffers, parameters it was not asked for) are counted, and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from demerge.analysis.experts.task_vectors import delta
from demerge.analysis.measurement.sketch import CountSketch
from demerge.conflict import Array, ConflictMap, layer_of, layers_of
from demerge.errors import InputError
from demerge.storage.checkpoint import finite, modern

Progress = Callable[[int, int, str], None]
Model = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """K task vectors, shortened.

    Attributes:
        sketch: h(tau_n) [K k].
        layers: the sketches of its layers side by side, [K W]; 0 where the map has none.
        squares: |tau_n|^2 on each layer [K L].
        outside: |tau_n|^2 on the coordinates that the map does not have, [K].
    """

    sketch: Array
    layers: Array
    squares: Array
    outside: Array


def sketched(
    map: ConflictMap,
    base: Model,
    experts: Sequence[Model],
    labels: Sequence[str],
    progress: Progress | None,
) -> Vectors:
    """Sketch the task vectors of K experts with the signs of a map, reading base and experts once, a tensor at a time.

    Args:
        base, experts: as `transfer` takes them.
        labels: of the experts, for errors.
        progress: called as progress(done, total, what) after each tensor.

    Raises:
        InputError: where the base lacks one of the map's parameters or has it in another size, an expert lacks a tensor or has
            another shape, or a value is not finite.
    """
    places, names = _places(map, base), [name for name in base if base[name].is_floating_point()]
    sketch, K = CountSketch.of(map.origin.parameters, map.origin.seed), len(experts)
    short = sketch.layers(map.layout)
    whole, parts = (
        [sketch.zeros() for _ in experts],
        [sketch.zeros().new_zeros(short.width) for _ in experts],
    )
    squares, outside = np.zeros((K, len(short.parts))), np.zeros(K)
    for done, name in enumerate(names, 1):
        for n, expert in enumerate(experts):
            tau = delta(base[name], expert, name, labels[n])
            if tau is None:
                continue
            if not finite(tau):
                what = f"{labels[n]}: tensor '{name}' holds NaN or Inf, or the base's does"
                raise InputError(what, fix="use another checkpoint of it")
            square = float(tau.square().sum())
            if name not in places:
                outside[n] += square
                continue
            start, layer = places[name]
            squares[n, layer] += square
            sketch.add(whole[n], start, tau)
            if map.layers is not None:
                short.add(parts[n], start, tau)
        if progress is not None:
            progress(done, len(names), name)
    h, layers = (np.stack([total.double().numpy() for total in each]) for each in (whole, parts))
    return Vectors(h, layers, squares, outside)


def _places(map: ConflictMap, base: Model) -> dict[str, tuple[int, int]]:
    """Return the first coordinate and the number of the layer of each tensor that the map has."""
    of, layers = {modern(name): name for name in base}, list(layers_of(map.layout))
    missing = [name for name in map.layout if modern(name) not in of]
    if missing:
        listed = (
            f"{len(missing)} parameters of the map are not in the base: {', '.join(missing[:5])}"
        )
        raise InputError(listed, fix="name the base that the map was measured on")
    places, start = {}, 0
    for name, numel in map.layout.items():
        tensor = base[of[modern(name)]]
        if tensor.numel() != numel or not tensor.is_floating_point():
            what = f"'{name}' is {tensor.dtype} {list(tensor.shape)} in the base, {numel} coordinates in the map"
            raise InputError(what, fix="name the base that the map was measured on")
        places[of[modern(name)]] = (start, layers.index(layer_of(name)))
        start += numel
    return places
