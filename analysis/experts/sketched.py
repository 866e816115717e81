"""Task vectors as a conflict map's sketches see them: h(tau_n), one of each layer, and squares.

Tensors are matched to coordinates by name, as diffusers holds it: the order in a file does not
matter. Tensors of the base that the map does not have (buffers, parameters that were not measured)
are counted and left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from demerge.analysis.experts.task_vectors import task_vector
from demerge.analysis.measurement.sketch import CountSketch
from demerge.conflict import Array, ConflictMap, layer_of, layers_of
from demerge.errors import InputError
from demerge.progress import Progress, silent
from demerge.storage.checkpoint import finite, modern

Model = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class SketchedVectors:
    """K task vectors, shortened."""

    sketch: Array  # h(tau_n) [K k]
    layers: Array  # the sketches of its layers side by side, [K W]; 0 if the map has none
    squares: Array  # |tau_n|^2 on each layer [K L]
    outside: Array  # |tau_n|^2 on the coordinates that the map does not have, [K]


def sketch_vectors(
    map: ConflictMap,
    base: Model,
    experts: Sequence[Model],
    labels: Sequence[str],
    progress: Progress = silent,
) -> SketchedVectors:
    """Sketch the task vectors of K experts with the signs of a map, one tensor at a time."""
    coordinates = _coordinates(map, base)
    names = [name for name in base if base[name].is_floating_point()]
    sketch, K = CountSketch.of(map.origin.parameters, map.origin.seed), len(experts)
    short = sketch.layers(map.layout)
    whole, parts = (torch.zeros(K, each.width, dtype=torch.float64) for each in (sketch, short))
    squares, outside = np.zeros((K, len(short.parts))), np.zeros(K)
    for done, name in enumerate(names, 1):
        for n, expert in enumerate(experts):
            tau = task_vector(base[name], expert, name, labels[n])
            if tau is None:
                continue
            if not finite(tau):
                what = f"{labels[n]} or the base: tensor '{name}' holds NaN or Inf"
                raise InputError(what, fix="use another checkpoint of it")
            square = float(tau.square().sum())
            if name not in coordinates:
                outside[n] += square
                continue
            start, layer = coordinates[name]
            squares[n, layer] += square
            sketch.add(whole[n], start, tau)
            if map.layers is not None:
                short.add(parts[n], start, tau)
        progress(done, len(names), name)
    return SketchedVectors(whole.numpy(), parts.numpy(), squares, outside)


def _coordinates(map: ConflictMap, base: Model) -> dict[str, tuple[int, int]]:
    """Return the first coordinate and the number of the layer of each tensor that the map has."""
    fix = "name the base that the map was measured on"
    of, layers = {modern(name): name for name in base}, list(layers_of(map.layout))
    missing = [name for name in map.layout if modern(name) not in of]
    if missing:
        if map.origin.lora_rank is not None:
            fix = "measure a map of the base's own weights, without --params lora"
        what = f"{len(missing)} parameters of the map are not in the base: {', '.join(missing[:5])}"
        raise InputError(what, fix=fix)
    coordinates, start = {}, 0
    for name, numel in map.layout.items():
        tensor = base[of[modern(name)]]
        if tensor.numel() != numel or not tensor.is_floating_point():
            held = f"{tensor.dtype} {list(tensor.shape)} in the base"
            raise InputError(f"'{name}' is {held}, {numel} coordinates in the map", fix=fix)
        coordinates[of[modern(name)]] = (start, layers.index(layer_of(name)))
        start += numel
    return coordinates
