"""The conflict map: how the gradients of all timesteps relate, measured once, read many times.

Timesteps lie in N bins, samples in M groups. s_i^m [D] is the gradient of the loss in bin i on the
samples of group m, at the base model. The map holds the inner products of all of them,

    G[i, m, j, n] = <s_i^m, s_j^n>,

which is all that similarity, errors, partitions and their bootstrap need: they run without the
model. How the products were computed (from exact gradients or from sketches) is a field, `engine`.
The map also holds count sketches h(s_i^m) [k], whose products with the sketch of any other vector,
such as a task vector, are <s_i^m, vector> up to an error of about |s| |vector| sqrt(2/k); and a
short one of each layer, if it was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import Field

from demerge.errors import DemergeError, InputError
from demerge.storage.atomic import commit_bytes
from demerge.storage.safetensors_header import read_header
from demerge.storage.schema import MAX_TIMESTEPS, Record, parse_record
from demerge.timesteps import Partition

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Sketches = NDArray[np.float32]

FORMAT = "demerge.conflict/1"
ARRAYS = ("gram", "log_snr", "sketches", "layers")
K = 65_521  # numbers of a sketch: the largest prime below 2^16
LAYER_K = 509  # of one of a layer: the largest prime below 2^9
MIN_GROUPS = 5
MAX_CELLS = 1 << 14
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError,
    DemergeError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Origin:
    """What a map was measured on and how; two maps of one origin are the same map.

    Attributes:
        model: SHA-256 of the base denoiser's tensors.
        data: fingerprint of the images.
        parameters: D, the length of a gradient.
        engine: `exact`, or how gradients were shortened before their products: `sketch-65521`.
        draws: `shared` between the bins of a group, or `independent`.
        antithetic: whether a group's noise comes in pairs eps, -eps; one for each bin if a pilot
            chose.
        metric: of the inner products, `euclid` or `adam`.
        batch_size: samples per bin and group.
        seed: of all draws and of a sketch.
        params: which parameters count: `all`, `lora` or a regular expression.
        lora_rank, target_modules: of the LoRA that was put into a base without one for `lora`.
        precision: of the model's own arithmetic: `no` (float32), or `bf16` under autocast.
        prediction: what the model predicts: `epsilon`, `v_prediction` or `sample`.
        base: fingerprint of the whole base, with its configs, schedule and other components.
    """

    model: str
    data: str
    parameters: Annotated[int, Field(ge=1)]
    engine: str
    draws: str
    antithetic: bool | tuple[bool, ...]
    metric: str
    batch_size: Annotated[int, Field(ge=1)]
    seed: int
    params: str = "all"
    precision: str = "no"
    prediction: str = ""
    base: str = ""
    lora_rank: int | None = None
    target_modules: tuple[str, ...] = ()

    @property
    def noise(self) -> str:
        """Whether noise came with its opposite, in the word of `analyze --antithetic`."""
        return "auto" if isinstance(self.antithetic, tuple) else "on" if self.antithetic else "off"

    @property
    def kept(self) -> Literal["exact", "sketch"]:
        """What was stored of the gradients, in the word of `analyze --engine`."""
        return "exact" if self.engine == "exact" else "sketch"


class MapHeader(Record):
    """The metadata of a conflict.safetensors: edges of bins, origin, sizes of parameters."""

    format: Literal["demerge.conflict/1"]
    edges: Annotated[tuple[int, ...], Field(min_length=2)]
    origin: Origin
    layout: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ConflictMap:
    """Inner products of the gradients of N bins and M groups.

    Attributes:
        bins: N contiguous ranges of training timesteps.
        gram: G [N M N M], float64, read-only.
        log_snr: log SNR(t) [T], float64, read-only, of the base's schedule.
        origin: what it was measured on.
        layout: how many coordinates each parameter has, by name, in order; empty without sketches.
        sketches: h(s_i^m) [N M k], float32, read-only.
        layers: the sketches of each layer's part of s_i^m, side by side [N M W], float32, read-only
            (see `layers_of`).

    Raises:
        InputError: if shapes do not fit, a value is not finite, G is not a Gram matrix, or there
            are fewer than 5 groups.
    """

    bins: Partition
    gram: Array
    log_snr: Array
    origin: Origin
    layout: Mapping[str, int] = field(default_factory=dict)
    sketches: Sketches | None = None
    layers: Sketches | None = None

    def __post_init__(self) -> None:
        _check(self)
        for name, array in self._arrays().items():
            view = array.view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)

    def __repr__(self) -> str:
        samples = f"{self.M} groups of {self.origin.batch_size}, {self.origin.draws} draws"
        bins = f"{self.N} bins of [0, {self.T})"
        return f"ConflictMap({bins}, {samples}, {self.origin.engine})"

    def _arrays(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return {name: array for name, array in arrays.items() if array is not None}

    @property
    def N(self) -> int:
        """The number of bins."""
        return len(self.bins)

    @property
    def M(self) -> int:
        """The number of groups of samples."""
        return int(self.gram.shape[1])

    @property
    def T(self) -> int:
        """The number of training timesteps."""
        return self.bins.total

    @property
    def edges(self) -> list[int]:
        """The N + 1 boundaries of the bins, from 0 to T."""
        return [0, *self.bins.cuts, self.T]

    @property
    def timesteps(self) -> Array:
        """The middle of each bin, [N]."""
        return np.array([(bin.start + bin.stop - 1) / 2 for bin in self.bins])

    @property
    def widths(self) -> Array:
        """The share of [0, T) that each bin covers, [N], summing to 1."""
        return np.array([len(bin) / self.T for bin in self.bins])

    def to_frame(self) -> pd.DataFrame:
        """Return what the map says of each pair of bins, [N^2 rows]; `analysis.similarity.frame`.

        Columns bin_i, bin_j, t_i, t_j (the middles), cosine and se (NaN if a bin is unresolved),
        resolved, weak.
        """
        # imports run down, and the analysis knows the map: it is found by name
        table: pd.DataFrame = import_module("demerge.analysis.similarity").frame(self)
        return table

    def plot(self, partition: Partition | None = None) -> Figure:
        """Draw the map, with the boundaries of a partition; `analysis.report.plots.heat_map`."""
        plots = import_module("demerge.analysis.report.plots")
        figure: Figure = plots.heat_map(self, partition)
        return figure

    def save(self, path: Path | str) -> Path:
        """Write the map as safetensors, whole or not at all; equal maps give equal bytes."""
        header = {
            "format": FORMAT,
            "edges": self.edges,
            "origin": asdict(self.origin),
            "layout": list(self.layout.items()),
        }
        tensors = {name: np.ascontiguousarray(array) for name, array in self._arrays().items()}
        metadata = {"demerge": json.dumps(header, sort_keys=True)}
        return commit_bytes(path, safetensors.numpy.save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: Path | str) -> ConflictMap:
        """Read and check a `conflict.safetensors`.

        Raises:
            InputError: if the file is missing, damaged or something else.
        """
        path = Path(path)
        if not path.is_file():
            fix = "name the folder or file that `demerge analyze` wrote"
            raise InputError(f"{path}: not a conflict map: the file does not exist", fix=fix)
        try:
            file = read_header(path)
            text = file.metadata.get("demerge", "null")
            header = parse_record(text, MapHeader, str(path), fix="")
            _check_header(header, {name: list(spec.shape) for name, spec in file.tensors.items()})
            arrays = safetensors.numpy.load_file(path)
            bins = Partition.from_cuts(header.edges[-1], header.edges[1:-1])
            return cls(bins, origin=header.origin, layout=dict(header.layout), **arrays)
        except UNREADABLE as error:
            what = "its metadata is incomplete or damaged"
            if isinstance(error, DemergeError):
                what = error.what.removeprefix(f"{path}: ")
            fix = "remove it and measure it again with `demerge analyze`"
            raise InputError(f"{path}: not a conflict map: {what}", fix=fix) from error


def _check_header(header: MapHeader, shapes: Mapping[str, list[int]]) -> None:
    """Check a foreign file before anything of the size it claims is read."""
    edges = header.edges
    if edges[0] != 0:
        raise InputError("the edges of its bins are not ascending numbers from 0")
    if not {"gram", "log_snr"} <= set(shapes) <= set(ARRAYS):
        raise InputError(f"it holds {', '.join(sorted(shapes)) or 'nothing'}, not gram and log_snr")
    gram = shapes["gram"]
    if len(gram) != 4 or gram[0] * gram[1] > MAX_CELLS or edges[-1] > MAX_TIMESTEPS:
        raise InputError(f"its gram of shape {gram} over {edges[-1]} timesteps is too large")


def _check(map: ConflictMap) -> None:
    gram, log_snr, N = map.gram, map.log_snr, map.N
    M = gram.shape[1] if gram.ndim == 4 else 0
    fix = "measure the map again"
    if gram.shape != (N, M, N, M) or log_snr.shape != (map.T,):
        shapes = f"gram {gram.shape} and log_snr {log_snr.shape}"
        raise InputError(f"{N} bins, {map.T} timesteps, but {shapes}", fix=fix)
    if M < MIN_GROUPS:
        raise InputError(f"{M} groups are too few for errors", fix=f"use at least {MIN_GROUPS}")
    if gram.dtype != np.float64 or log_snr.dtype != np.float64:
        what = f"gram and log_snr are {gram.dtype} and {log_snr.dtype}, not float64"
        raise InputError(what, fix=fix)
    noise = map.origin.antithetic
    if isinstance(noise, tuple) and len(noise) != N:
        raise InputError(f"antithetic noise is said of {len(noise)} bins, not of {N}", fix=fix)
    _check_sketches(map)
    for name, array in map._arrays().items():
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds a value that is not finite", fix=fix)
    flat = gram.reshape(N * M, -1)
    squares = np.diagonal(flat)
    norms = np.sqrt(squares.clip(0))
    lengths = np.outer(norms, norms)
    is_asymmetric = abs(flat - flat.T) > 1e-4 * lengths
    is_too_large = abs(flat) > (1 + 1e-4) * lengths
    if (squares < 0).any() or is_asymmetric.any() or is_too_large.any():
        raise InputError("gram holds numbers that are not inner products of vectors", fix=fix)


def _check_sketches(map: ConflictMap) -> None:
    D, fix = map.origin.parameters, "measure the map again"
    sizes = list(map.layout.values())
    if map.sketches is None and map.layers is None and not sizes:
        return
    if not all(type(size) is int and size > 0 for size in sizes) or sum(sizes) != D:
        raise InputError(f"its layout does not have {D} coordinates", fix=fix)
    widths = {"sketches": min(K, D), "layers": sum(layer_widths(map.layout))}
    for name, width in widths.items():
        array, shape = getattr(map, name), (map.N, map.M, width)
        if array is not None and (array.shape != shape or array.dtype != np.float32):
            what = f"{name} is {array.dtype} {array.shape}, not float32 {shape}"
            raise InputError(what, fix=fix)


def layers_of(layout: Mapping[str, int]) -> dict[str, int]:
    """Return how many coordinates each layer has: the parameters of one module, side by side."""
    sizes: dict[str, int] = {}
    for name, numel in layout.items():
        layer = layer_of(name)
        sizes[layer] = sizes.get(layer, 0) + numel
    return sizes


def layer_of(name: str) -> str:
    """Return the layer of a parameter or buffer: its module, or its own name if it has none."""
    return name.rpartition(".")[0] or name


def layer_widths(layout: Mapping[str, int]) -> list[int]:
    """Return how many numbers each layer's sketch has, side by side in `ConflictMap.layers`."""
    return [min(LAYER_K, size) for size in layers_of(layout).values()]
