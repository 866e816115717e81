"""Gradients of the loss by bin of timesteps and group of samples, and their inner products.

    s_i^m = grad_theta (1/B) sum_b |y - f(x_t, t)|^2,    t uniform in bin i, samples b of group m  (draws.py)

at the base model, in eval mode (no dropout), in float32. Each cell (i, m) is one ordinary backward pass. Gradients of all
cells must meet in pairs, and one of two engines keeps what that takes:

    exact           the gradients, [M N D]
    sketch-65521    a count sketch of each, [M N k], whatever the model: <h(s), h(s')> for <s, s'>  (sketch.py)

The first is taken where it fits `memory`, and is the oracle of the second.

The metric `adam` scales coordinate p by v_p^(-1/4), so that <a, b> becomes sum_p a_p b_p / sqrt(v_p), as an Adam step weighs
it; in `euclid` a few tensors carry nearly all of it, noise included. v, the mean of squared gradients over all bins, must
be known before a gradient is sketched: it comes from a pilot of one cell per bin on samples of its own, for both engines, so
that the metric is the same one and does not depend on the noise of any group.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

from torch import Tensor

from demerge.analysis.measurement.backward import Backward, select
from demerge.analysis.measurement.cells import Cells, Everything, Keep, Progress, SideBySide, products
from demerge.analysis.measurement.draws import Draws
from demerge.analysis.measurement.partial import Partial
from demerge.analysis.measurement.sketch import CountSketch
from demerge.conflict import LAYER_K, MIN_GROUPS, ConflictMap, K, Origin, layers_of
from demerge.data import ImageData
from demerge.diffusion import Diffusion
from demerge.errors import ResourceError, UsageError
from demerge.files import refuse_small_disk
from demerge.stats.examples import accumulator
from demerge.timesteps import Partition

DRAWS = ("shared", "independent")
METRICS = ("euclid", "adam")
ENGINES = ("auto", "exact", "sketch")
MEMORY = 2 << 30
MAX_LOG_SNR = 20.0  # schedules that end in pure noise have log SNR = -inf


@dataclass(frozen=True, slots=True)
class Cost:
    """What a measurement will take: backward passes of B samples each, and bytes for what it keeps of the gradients."""

    passes: int
    engine: str
    bytes: int

    def __str__(self) -> str:
        kept = "exact gradients" if self.engine == "exact" else f"sketches of {K:,} numbers"
        return f"{self.passes} backward passes, {self.bytes / 1e6:,.0f} MB of {kept}"


@dataclass(frozen=True, slots=True)
class Settings:
    """How gradients are measured; see `measure`.

    Raises:
        UsageError: where a value is out of its range.
    """

    bins: int = 20
    groups: int = 8
    batch_size: int = 16
    seed: int = 0
    draws: str = "shared"
    antithetic: bool = False
    metric: str = "euclid"
    engine: str = "auto"
    params: str = "all"
    layers: bool = False
    memory: int = MEMORY

    def __post_init__(self) -> None:
        if self.groups < MIN_GROUPS:
            raise UsageError(f"{self.groups} groups are too few for errors", fix=f"use at least {MIN_GROUPS}")
        if min(self.bins, self.batch_size, self.memory) < 1:
            raise UsageError(
                f"{self.bins} bins, batch size {self.batch_size} and {self.memory} bytes must all be at least 1",
                fix="give more",
            )
        for name, value, known in (
            ("draws", self.draws, DRAWS),
            ("metric", self.metric, METRICS),
            ("engine", self.engine, ENGINES),
        ):
            if value not in known:
                raise UsageError(f"{name} '{value}' is unknown", fix=f"use one of {', '.join(known)}")
        if self.antithetic and self.batch_size % 2:
            raise UsageError(f"batch size {self.batch_size} makes no antithetic pairs", fix="give an even one")


@dataclass(frozen=True, slots=True)
class Measurement:
    """Gradients of a model on data, as they are about to be measured.

    Raises:
        UsageError: where there is no image, a setting does not fit the model, or `params` fits no parameter.
        ResourceError: where what is to be kept does not fit the memory.
    """

    model: Diffusion
    data: ImageData
    settings: Settings
    mode: str = "auto"

    def __post_init__(self) -> None:
        if len(self.data) < 1:
            raise UsageError("there is no image to measure gradients on", fix="give more data")
        Partition.uniform(self.model.T, self.settings.bins)
        self.cost()

    @property
    def layout(self) -> dict[str, int]:
        """How many coordinates each parameter has, by name, in their order."""
        return {name: p.numel() for name, p in select(self.model.denoiser, self.settings.params).items()}

    @property
    def parameters(self) -> int:
        """D, the number of coordinates of a gradient."""
        return sum(self.layout.values())

    def cost(self) -> Cost:
        """Return what `run` will take, and with which engine."""
        s, D = self.settings, self.parameters
        cells, pilot = s.bins * s.groups, s.bins if s.metric == "adam" else 0
        exact = s.engine == "exact" or (s.engine == "auto" and (4 * cells * D <= s.memory or D <= K))
        kept = min(K, D) + (sum(min(LAYER_K, size) for size in layers_of(self.layout).values()) if s.layers else 0)
        needed = 4 * cells * (kept + (D if exact else 0))
        if needed > s.memory:
            instead = ", or --engine sketch" if exact and D > K else ""
            raise ResourceError(
                f"{cells} {'gradients' if exact else 'sketches'} of {D if exact else K:,} numbers take {needed / 1e9:.2f} GB,"
                f" and memory for them is {s.memory / 1e9:.2f} GB",
                fix=f"allow more memory{instead}, or take fewer bins or groups",
            )
        return Cost(cells + pilot, "exact" if exact else f"sketch-{K}", needed)

    def origin(self) -> Origin:
        """Return what the map will be one of."""
        s = self.settings
        facts = (self.model.sha256, self.data.fingerprint, self.parameters, self.cost().engine)
        return Origin(*facts, s.draws, s.antithetic, s.metric, s.batch_size, s.seed, s.params)

    def run(self, partial: Partial, progress: Progress | None = None) -> ConflictMap:
        """Measure what `partial` does not hold yet, and return the map.

        Raises:
            NumericalError: where a gradient is not finite, naming bin, group and sample.
        """
        s, cost = self.settings, self.cost()
        denoiser = copy.deepcopy(self.model.denoiser).float().eval()
        student, backward = self.model.with_denoiser(denoiser), Backward(denoiser, s.params, self.mode)
        bins = Partition.uniform(self.model.T, s.bins)
        draws = Draws(student, self.data, bins, s.groups, s.batch_size, s.seed, s.draws == "shared", s.antithetic)
        sketch = CountSketch.of(backward.D, s.seed, device=self.model.device)
        short = SideBySide([sketch, *([sketch.layers(self.layout)] if s.layers else [])])
        keep: Keep = Everything(backward.D) if cost.engine == "exact" else short
        if partial.folder is not None:
            refuse_small_disk(partial.folder, cost.bytes)
        rows = Cells(draws, backward, keep, partial, cost.passes, progress).rows(adam=s.metric == "adam")
        whole, short_rows = (rows, _shortened(rows, short)) if cost.engine == "exact" else (rows[..., : sketch.width], rows)
        gram = products(whole.flatten(0, 1)).reshape(s.groups, s.bins, s.groups, s.bins).transpose(1, 0, 3, 2)
        log_snr = self.model.snr().log().clamp(-MAX_LOG_SNR, MAX_LOG_SNR).numpy()
        sketches, layers = short_rows.transpose(0, 1).cpu().numpy()[..., : sketch.width], None
        if s.layers:
            layers = short_rows.transpose(0, 1).cpu().numpy()[..., sketch.width :]
        return ConflictMap(bins, gram, log_snr, self.origin(), self.layout, sketches, layers)

    def key(self) -> dict[str, object]:
        """Return what a part must be a part of."""
        s = self.settings
        return {"bins": s.bins, "groups": s.groups, "layers": s.layers, **asdict(self.origin())}


def _shortened(rows: Tensor, keep: Keep) -> Tensor:
    """Return what is kept [M N width] of gradients [M N D]."""
    flat = rows.flatten(0, 1)
    found = accumulator((len(flat), keep.width), rows.device)
    for total, row in zip(found, flat, strict=True):
        keep.add(total, 0, row)
    return found.float().unflatten(0, rows.shape[:2])


def measure(
    model: Diffusion,
    data: ImageData,
    *,
    bins: int = 20,
    groups: int = 8,
    batch_size: int = 16,
    seed: int = 0,
    draws: str = "shared",
    antithetic: bool = False,
    metric: str = "euclid",
    engine: str = "auto",
    params: str = "all",
    layers: bool = False,
    memory: int = MEMORY,
    mode: str = "auto",
    progress: Progress | None = None,
) -> ConflictMap:
    """Measure how the gradients of `bins` equal bins of timesteps conflict, on `groups` groups of `batch_size` samples.

    Args:
        draws: `shared` between the bins of a group, or `independent` as a cross-check.
        antithetic: whether each draw is taken with its noise and with the opposite; the batch size must be even.
        metric: of inner products, `euclid` or `adam`.
        engine: what is kept of the gradients: `exact`, `sketch`, or `auto`, exact where it fits the memory.
        params: the parameters that count: `all`, `lora`, or a regular expression that occurs in their names.
        layers: whether a short sketch of each layer's gradient is kept too.
        memory: bytes that kept gradients or sketches may take.
        mode: how gradients are taken up: `flat`, `hooks`, or `auto` by size; the map is the same up to rounding.
        progress: called as progress(done, total, what) after each backward pass.

    Raises:
        UsageError: where an argument is out of its range or the data does not fit the model.
        ResourceError: where what is kept does not fit the memory.
        NumericalError: where a gradient is not finite.
    """
    settings = Settings(bins, groups, batch_size, seed, draws, antithetic, metric, engine, params, layers, memory)
    return Measurement(model, data, settings, mode).run(Partial(None, {}), progress)
