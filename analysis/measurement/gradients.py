"""Gradients of the loss by bin of timesteps and group of samples: what is measured, and its cost.

    s_i^m = grad_theta (1/B) sum_b |y - f(x_t, t)|^2,    t uniform in bin i, samples b of group m

at the base model, in eval mode (no dropout), in float32. Each cell (i, m) is one ordinary backward
pass. Gradients of all cells must meet in pairs, and one of two engines stores what that takes:

    exact           the gradients, [M N D]
    sketch-65521    a count sketch of each, [M N k], whatever the model: <h(s), h(s')> for <s, s'>

The first is used if it fits `memory`, and is the oracle of the second (sketch.py).

`params="lora"` takes the gradients of a LoRA at its start, f(x) = W x + s B A x with B = 0, that is
put into the base for the measurement. There the gradient of A is 0, and that of B is

    dL/dB = s (dL/dW) A^T          [m r], with dL/dW [m n] of the layer

so only B counts: a random projection of each weight's gradient by A, which is that of the finetune
of the same seed, with s = 1. Over the draws of A, <s_i, s_j> is r / (3 n) times <dL_i/dW, dL_j/dW>
in each layer of fan-in n. So cosines in one layer are those of the weights, with an error of about
1/sqrt(r m), and wide layers count less than they do with all weights. The base exists once, and a
gradient has as many numbers as B: large models fit.

The metric `adam` scales coordinate p by v_p^(-1/4), so that <a, b> becomes
sum_p a_p b_p / sqrt(v_p), as an Adam step weighs it; in `euclid` a few tensors carry nearly all of
it, noise included. v, the mean of squared gradients over all bins, must be known before a gradient
is sketched: it comes from a pilot of one cell per bin on samples of its own, for both engines, so
that the metric is the same and does not depend on the noise of any group.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from demerge.analysis.measurement.backward import LORA, select_parameters
from demerge.analysis.measurement.options import MeasurementOptions
from demerge.analysis.measurement.samples import TRIALS
from demerge.analysis.measurement.schedule import describe_schedule, log_snr
from demerge.conflict import MAX_CELLS, MIN_GROUPS, Array, K, Origin, layer_widths
from demerge.data import ImageData
from demerge.diffusion.adapters import share_weights
from demerge.diffusion.model import Diffusion
from demerge.durations import format_seconds
from demerge.errors import ResourceError, UsageError
from demerge.finetuning.lora import add_lora, check_lora
from demerge.finetuning.options import FinetuneOptions
from demerge.timesteps import Partition

FACTOR_B = r"\.lora_B\."


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementCost:
    """What a measurement takes."""

    passes: int  # backward passes of B samples
    engine: str  # how gradients are stored
    bytes: int  # of what is stored of them
    seconds: float | None = None  # expected, None if they were not measured
    trials: int = 0  # backward passes of two samples, for the choice of the noise
    at_most: bool = False  # whether it may be less, as the number of groups is open
    extra: int = 0  # backward passes beyond one for each cell, as a Fisher needs microbatches

    def __str__(self) -> str:
        passes = f"{'up to ' * self.at_most}{self.passes + self.extra} backward passes"
        if self.trials:
            passes += f" and {self.trials} of 2 samples"
        if self.seconds is not None:
            passes += f", {'at most' if self.at_most else 'about'} {format_seconds(self.seconds)}"
        stored = "exact gradients" if self.engine == "exact" else f"sketches of {K:,} numbers"
        return f"{passes}, {self.bytes / 1e6:,.0f} MB of {stored}"


@dataclass(frozen=True)
class Measurement:
    """A model, data and options that fit together.

    Raises:
        UsageError: if there is no image, an option does not fit the model, or `params` fits no
            parameter.
        ResourceError: if what is stored does not fit the memory.
    """

    model: Diffusion
    data: ImageData
    options: MeasurementOptions
    mode: str = "auto"
    ranges: Partition | None = None  # bins are cut at their boundaries too

    def __post_init__(self) -> None:
        if len(self.data) < 1:
            raise UsageError("there is no image to measure gradients on", fix="give more data")
        if self.options.layers and self.lora is not None:
            what = "--layers sketches the layers of the base, and --params lora measures others"
            raise UsageError(what, fix="leave out --layers or --params")
        _ = self.bins
        self.cost()

    @cached_property
    def bins(self) -> Partition:
        """The bins of timesteps."""
        return cut_bins(self.model.T, self.options.bins, self.ranges)

    @cached_property
    def layout(self) -> dict[str, int]:
        """How many coordinates each parameter has, by name, in their order."""
        chosen = select_parameters(self.denoiser, self.which)
        return {name: p.numel() for name, p in chosen.items()}

    @cached_property
    def lora(self) -> FinetuneOptions | None:
        """The LoRA that is put into the base; None if it has one, or other parameters count."""
        o = self.options
        names = (name for name, _ in self.model.denoiser.named_parameters())
        if o.params != "lora" or any(re.search(LORA, name) for name in names):
            return None
        targets = tuple(o.target_modules)
        return FinetuneOptions(lora_rank=o.lora_rank, target_modules=targets, seed=o.seed)

    @cached_property
    def denoiser(self) -> nn.Module:
        """The denoiser whose gradients are taken: the base's, or one with a LoRA that shares it."""
        if self.lora is None:
            return self.model.denoiser
        check_lora(self.model, self.lora)
        return add_lora(share_weights(self.model.denoiser, torch.float32), self.lora)

    @property
    def which(self) -> str:
        """The parameters that count, as `select_parameters` takes it."""
        return self.options.params if self.lora is None else FACTOR_B

    @property
    def parameters(self) -> int:
        """D, the number of coordinates of a gradient."""
        return sum(self.layout.values())

    @cached_property
    def log_snr(self) -> Array:
        """log SNR(t) [T] of the model's schedule, within +-20."""
        return log_snr(self.model)

    @property
    def is_exact(self) -> bool:
        """Whether whole gradients are stored."""
        o = self.options
        if o.engine != "auto":
            return o.engine == "exact"
        needed = o.bins * o.most_groups * self._cell_bytes(True)
        return needed <= self._memory or self.parameters <= K

    @property
    def _memory(self) -> int:
        return round(self.options.memory * 1e9)

    @property
    def most_groups(self) -> int:
        """M, or the most groups there may be: if their number is open, no more than fit memory."""
        o = self.options
        if not o.is_open:
            return o.most_groups
        fitting = self._memory // (o.bins * self._cell_bytes(self.is_exact))
        return max(MIN_GROUPS, min(o.most_groups, fitting, MAX_CELLS // o.bins))

    def _cell_bytes(self, exact: bool) -> int:
        """Return what one cell takes: sketches, and the gradient if that is stored."""
        D = self.parameters
        numbers = min(K, D) + (D if exact else 0)
        if self.options.layers:
            numbers += sum(layer_widths(self.layout))
        return 4 * numbers

    def cost(self, groups: int | None = None, parts: int = 1) -> MeasurementCost:
        """Return what `groups` take, the most by default, with `parts` microbatches a cell."""
        o, D, exact = self.options, self.parameters, self.is_exact
        cells = o.bins * (groups or self.most_groups)
        needed = cells * self._cell_bytes(exact)
        if needed > self._memory:
            stored = "gradients" if exact else "sketches"
            instead = ", or --engine sketch" if exact and D > K else ""
            raise ResourceError(
                f"{cells} {stored} of {D if exact else K:,} numbers take {needed / 1e9:.2f} GB,"
                f" and --memory is {o.memory:.2f} GB",
                fix=f"give more --memory{instead}, or take fewer bins or groups",
            )
        if cells > MAX_CELLS:
            fix = f"take {MAX_CELLS // o.bins} groups, or fewer bins"
            raise UsageError(f"{cells:,} cells are more than the {MAX_CELLS:,} of a map", fix=fix)
        return MeasurementCost(
            passes=cells + (o.bins if o.metric == "adam" else 0),
            engine="exact" if exact else f"sketch-{K}",
            bytes=needed,
            trials=2 * TRIALS * o.bins if o.antithetic == "auto" else 0,
            extra=cells * (parts - 1),
        )

    def origin(self, antithetic: bool | tuple[bool, ...] | None = None) -> Origin:
        """Return the origin of the map; `antithetic` is what a pilot chose for each bin, if any."""
        o, model = self.options, self.model
        return Origin(
            model=model.sha256,
            data=self.data.fingerprint,
            parameters=self.parameters,
            engine=self.cost().engine,
            draws=o.draws,
            antithetic=o.antithetic == "on" if antithetic is None else antithetic,
            metric=o.metric,
            batch_size=o.batch_size,
            seed=o.seed,
            params=o.params,
            precision=o.mixed_precision,
            prediction=model.prediction_type,
            base=model.fingerprint,
            lora_rank=None if self.lora is None else self.lora.lora_rank,
            target_modules=() if self.lora is None else tuple(self.lora.target_modules),
        )

    def key(self) -> dict[str, Any]:
        """Return what parts of one measurement agree in; the number of groups is not part of it."""
        schedule = describe_schedule(self.log_snr)
        own = {"layers": self.options.layers, "schedule": schedule}
        return {
            "bins": describe_bins(self.bins),
            **own,
            **asdict(self.origin()),
            "antithetic": self.options.antithetic,
        }


def cut_bins(T: int, N: int, ranges: Partition | None = None) -> Partition:
    """Return N bins of [0, T) whose edges are also those of `ranges`, of widths as equal as can be.

    Bins of equal widths have these edges or not. If not, each range is divided equally, and the
    range with the widest bins gets the next bin.

    Raises:
        UsageError: if there are fewer bins than ranges, or more than timesteps.
    """
    uniform = Partition.uniform(T, N)
    if ranges is None or set(ranges.cuts) <= set(uniform.cuts):
        return uniform
    if len(ranges) > N:
        what = f"{N} bins do not hold {len(ranges)} ranges"
        raise UsageError(what, fix=f"give --bins {len(ranges)} or more")
    counts = [1] * len(ranges)
    for _ in range(N - len(ranges)):
        widths = [len(span) / count for span, count in zip(ranges, counts, strict=True)]
        counts[widths.index(max(widths))] += 1
    cuts = list(ranges.cuts)
    for span, count in zip(ranges, counts, strict=True):
        cuts += [span.start + cut for cut in Partition.uniform(len(span), count).cuts]
    return Partition.from_cuts(T, sorted(cuts))


def describe_bins(bins: Partition) -> int | list[int]:
    """Return the number of bins if their widths are equal, else their edges."""
    if bins == Partition.uniform(bins.total, len(bins)):
        return len(bins)
    return [0, *bins.cuts, bins.total]
