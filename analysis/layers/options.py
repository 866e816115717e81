"""The options of `demerge layers`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from demerge.analysis.partitioning.options import RangesOptions
from demerge.options import Options, again, option


@dataclass(frozen=True, kw_only=True, repr=False)
class LayersOptions(Options):
    """From which map layers are chosen, for which ranges, and how many."""

    map: Path = option(
        help="conflict.safetensors of `demerge analyze --layers`, or its folder.",
        argument=True,
        metavar="MAP",
    )
    ranges: str = option(
        "uniform:4", "Ranges of the experts: uniform:N, 0:500,500:1000 or a partition.json."
    )
    share: float = option(0.1, "Share of the parameters to train.", gt=0, le=1)
    model: str | None = again(RangesOptions, "model", panel=None)
    out: Path | None = option(
        None, "File for `demerge finetune --train-layers`.", flags=("-o", "--out")
    )
    plot: Path | None = option(None, "File for a plot of gains and curve, .svg or .png.")
