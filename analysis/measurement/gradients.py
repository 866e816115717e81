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
from dataclasses import asdict, dataclass, replace
from typing import Any

from demerge.analysis.measurement.backward import Backward, select
from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.collector import (
    TRIALS,
    GradientCollector,
    KeepAll,
    Progress,
    Reduction,
    SideBySide,
)
from demerge.analysis.measurement.draws import Draws
from demerge.analysis.measurement.fisher import RangeFisher
from demerge.analysis.measurement.options import MEMORY, Settings, duration, groups_of
from demerge.analysis.measurement.parallel import ALONE, World
from demerge.analysis.measurement.run import Run
from demerge.analysis.measurement.schedule import described, log_snr
from demerge.analysis.measurement.sketch import CountSketch
from demerge.conflict import MAX_CELLS, MIN_GROUPS, Array, ConflictMap, K, Origin, layer_widths
from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.diffusion.threads import fitting_threads
from demerge.errors import ResourceError, UsageError
from demerge.timesteps import Partition


@dataclass(frozen=True, slots=True)
class Cost:
    """What a measurement will take: backward passes of B samples each, and bytes for what it keeps of the gradients.

    Attributes:
        seconds: expected, None where they were not measured.
        trials: backward passes of two samples each, for the choice of the noise.
        most: whether it may be less, as the number of groups is open.
        more: backward passes beyond one for each cell, as a Fisher takes it in microbatches.
    """

    passes: int
    engine: str
    bytes: int
    seconds: float | None = None
    trials: int = 0
    most: bool = False
    more: int = 0

    def __str__(self) -> str:
        kept = "exact gradients" if self.engine == "exact" else f"sketches of {K:,} numbers"
        took = (
            ""
            if self.seconds is None
            else f", {'at most' if self.most else 'about'} {duration(self.seconds)}"
        )
        trials = f" and {self.trials} of 2 samples" if self.trials else ""
        passes = f"{'up to ' * self.most}{self.passes + self.more} backward passes{trials}{took}"
        return f"{passes}, {self.bytes / 1e6:,.0f} MB of {kept}"


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
        return {
            name: p.numel() for name, p in select(self.model.denoiser, self.settings.params).items()
        }

    @property
    def parameters(self) -> int:
        """D, the number of coordinates of a gradient."""
        return sum(self.layout.values())

    @property
    def log_snr(self) -> Array:
        """log SNR(t) [T] of the model's schedule, within +-20."""
        return log_snr(self.model)

    @property
    def exact(self) -> bool:
        """Whether whole gradients are kept."""
        s, D = self.settings, self.parameters
        return s.engine == "exact" or (
            s.engine == "auto" and (s.bins * s.groups * self._bytes(True) <= s.memory or D <= K)
        )

    @property
    def most(self) -> int:
        """M, or the most groups there may be: where their number is open, no more than fit the memory."""
        s = self.settings
        if not s.open:
            return s.groups
        return max(
            MIN_GROUPS,
            min(s.groups, s.memory // (s.bins * self._bytes(self.exact)), MAX_CELLS // s.bins),
        )

    def _bytes(self, exact: bool) -> int:
        """Return what one cell takes: sketches, and the gradient where that is kept."""
        D = self.parameters
        kept = min(K, D) + (sum(layer_widths(self.layout)) if self.settings.layers else 0)
        return 4 * (kept + (D if exact else 0))

    def cost(self, groups: int | None = None, parts: int = 1) -> Cost:
        """Return what `run` will take, and with which engine; of that many groups, or the most, each cell in microbatches."""
        s, D, exact = self.settings, self.parameters, self.exact
        cells = s.bins * (groups or self.most)
        needed = cells * self._bytes(exact)
        if needed > s.memory:
            instead = ", or --engine sketch" if exact and D > K else ""
            raise ResourceError(
                f"{cells} {'gradients' if exact else 'sketches'} of {D if exact else K:,} numbers take {needed / 1e9:.2f} GB,"
                f" and memory for them is {s.memory / 1e9:.2f} GB",
                fix=f"allow more memory{instead}, or take fewer bins or groups",
            )
        if cells > MAX_CELLS:
            raise UsageError(
                f"{cells:,} cells are more than the {MAX_CELLS:,} of a map",
                fix=f"take {MAX_CELLS // s.bins} groups, or fewer bins",
            )
        pilot, trials = (
            s.bins * (s.metric == "adam"),
            2 * TRIALS * s.bins * (s.antithetic == "auto"),
        )
        return Cost(
            cells + pilot,
            "exact" if exact else f"sketch-{K}",
            needed,
            None,
            trials,
            more=cells * (parts - 1),
        )

    def origin(self, antithetic: bool | tuple[bool, ...] | None = None) -> Origin:
        """Return what the map will be one of; where a pilot chooses the noise, with what it chose."""
        s, of = self.settings, self.model
        facts = (of.sha256, self.data.fingerprint, self.parameters, self.cost().engine, s.draws)
        paired = s.antithetic == "on" if antithetic is None else antithetic
        return Origin(
            *facts,
            paired,
            s.metric,
            s.batch_size,
            s.seed,
            s.params,
            s.precision,
            of.prediction_type,
            of.fingerprint,
        )

    def key(self) -> dict[str, Any]:
        """Return what a part must be a part of; the number of groups is none of it."""
        s = self.settings
        own = {"bins": s.bins, "layers": s.layers, "schedule": described(self.log_snr)}
        return {**own, **asdict(self.origin()), "antithetic": s.antithetic}

    def begin(
        self,
        partial: MeasurementCheckpoint,
        *,
        world: World = ALONE,
        start: ConflictMap | None = None,
        fisher: RangeFisher | None = None,
        timed: bool = False,
    ) -> Run:
        """Make ready to measure what neither `partial` nor the map `start` of fewer groups holds.

        Args:
            world: the processes among which the groups are shared.
            fisher: takes its share of each cell; what it does not hold is measured again, whatever `start` holds.
            timed: whether a backward pass is timed for the cost; for a budget it always is.

        Raises:
            UsageError: where `start` was made of exact gradients, which a map does not hold.
            ResourceError: where the budget does not suffice for 5 groups.
        """
        s = self.settings
        denoiser = copy.deepcopy(self.model.denoiser).float().eval()
        student, backward = (
            self.model.with_denoiser(denoiser),
            Backward(denoiser, s.params, self.mode),
        )
        bins = Partition.uniform(self.model.T, s.bins)
        draws = Draws(
            student,
            self.data,
            bins,
            s.batch_size,
            s.seed,
            s.draws == "shared",
            s.antithetic == "on",
        )
        sketch = CountSketch.of(backward.D, s.seed, device=self.model.device)
        short = SideBySide([sketch, *([sketch.layers(self.layout)] if s.layers else [])])
        keep: Reduction = KeepAll(backward.D) if self.exact else short
        cells = GradientCollector(
            draws, backward, keep, partial, 0, world=world, precision=s.precision, fisher=fisher
        )
        run = Run(self, cells, sketch, short, start)
        if timed or s.budget is not None:
            with fitting_threads(self.model, s.batch_size):
                run = replace(run, seconds=cells.seconds())
        run.check_budget()
        return run

    def run(
        self,
        partial: MeasurementCheckpoint,
        progress: Progress | None = None,
        fisher: RangeFisher | None = None,
    ) -> ConflictMap:
        """Measure what `partial` does not hold yet, and return the map; see `Run.map`."""
        return self.begin(partial, fisher=fisher).map(progress)


def measure(
    model: Diffusion,
    data: ImageData,
    *,
    bins: int = 20,
    groups: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    draws: str = "shared",
    antithetic: str | bool = "off",
    metric: str = "euclid",
    engine: str = "auto",
    params: str = "all",
    layers: bool = False,
    memory: int = MEMORY,
    budget: float | None = None,
    se: float | None = None,
    precision: str = "no",
    mode: str = "auto",
    progress: Progress | None = None,
) -> ConflictMap:
    """Measure how the gradients of `bins` equal bins of timesteps conflict, on groups of `batch_size` samples.

    Args:
        groups: how many groups, 8 by default; with a budget or an SE the most there may be, 64 by default.
        draws: `shared` between the bins of a group, or `independent` as a cross-check.
        antithetic: whether each draw is taken with its noise and with the opposite: `on`, `off`, or `auto`, in those bins
            where a pilot finds less noise so; the batch size must be even.
        metric: of inner products, `euclid` or `adam`.
        engine: what is kept of the gradients: `exact`, `sketch`, or `auto`, exact where it fits the memory.
        params: the parameters that count: `all`, `lora`, or a regular expression that occurs in their names.
        layers: whether a short sketch of each layer's gradient is kept too.
        memory: bytes that kept gradients or sketches may take.
        budget: seconds; as many groups are measured as fit, at least 5.
        se: groups are measured until the median SE of the similarity of neighbouring bins is at most this.
        precision: of the model's forward pass: `no`, float32, or `bf16` under autocast; gradients are summed in float64.
        mode: how gradients are taken up: `flat`, `hooks`, or `auto` by size; the map is the same up to rounding.
        progress: called as progress(done, total, what) after each backward pass.

    Raises:
        UsageError: where an argument is out of its range or the data does not fit the model.
        ResourceError: where what is kept does not fit the memory, or 5 groups do not fit the budget.
        NumericalError: where a gradient is not finite.
    """
    settings = Settings(
        bins=bins,
        groups=groups_of(groups, open=budget is not None or se is not None),
        batch_size=batch_size,
        seed=seed,
        draws=draws,
        antithetic=antithetic,
        metric=metric,
        engine=engine,
        params=params,
        layers=layers,
        memory=memory,
        budget=budget,
        se=se,
        precision=precision,
    )
    return Measurement(model, data, settings, mode).run(MeasurementCheckpoint(None, {}), progress)
