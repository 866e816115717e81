"""What measuring a conflict map costs beside plain training passes, and how far sketches lie from exact gradients.

    OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/conflict.py --batch-size 16 --repeat 3

runs each model's cells (bins x groups) in turns as plain forward and backward passes (the same draws, no optimizer) and as
`measure` with each engine, flat also with sketches of the layers, whole calls with their set-up, and compares seconds: of the
CPU, or on an accelerator of the clock. `overhead` is the median over the turns of a row's seconds over those of the plain
passes in the same turn. `rmse` is that of the cosines of all pairs of cells against those of exact gradients, where both fit
the memory. Models: the `digits` base, `small` with 1.6 M parameters at 32 x 32, `cifar10` with the 36 M of google/ddpm-
cifar10-32, both with random weights. `--json` prints one document; its `overhead_ratio` is that of the flat sketch of the
last model.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Any

import numpy as np
from turns import CLOCK, CPU, MODELS, load, median, ratio, show, take_turns

from demerge.analysis.measurement.gradients import Measurement
from demerge.analysis.measurement.options import MeasurementOptions
from demerge.analysis.measurement.run import measure
from demerge.analysis.measurement.samples import Draws
from demerge.conflict import ConflictMap
from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.errors import ResourceError, UsageError
from demerge.timesteps import Partition

ENGINES: dict[str, dict[str, Any]] = {
    "exact": {"engine": "exact", "mode": "flat"},
    "sketch flat": {"engine": "sketch", "mode": "flat"},
    "sketch hooks": {"engine": "sketch", "mode": "hooks"},
    "sketch layers": {"engine": "sketch", "mode": "flat", "layers": True},
}


def plain(model: Diffusion, data: ImageData, bins: int, groups: int, batch_size: int) -> None:
    """Run forward and backward of every cell."""
    partition = Partition.uniform(model.T, bins)
    draws = Draws(model, data, partition, batch_size, seed=0, shared=True, antithetic=False)
    model.denoiser.requires_grad_(True)
    for m in range(groups):
        for span, draw in zip(partition, draws.group(m), strict=True):
            model.denoiser.zero_grad()
            draw.loss(model, span).backward()
    model.denoiser.zero_grad()
    model.denoiser.requires_grad_(False)


def cosines(map: ConflictMap) -> np.ndarray:
    """Return the cosines of all pairs of different cells."""
    cells = map.N * map.M
    gram = map.gram.reshape(cells, cells)
    norms = np.sqrt(np.diagonal(gram))
    return np.asarray((gram / np.outer(norms, norms))[np.triu_indices(cells, 1)])


def compare(name: str, asked: argparse.Namespace) -> list[dict[str, object]]:
    """Return a line for the plain passes of a model and one for each engine."""
    model, data = load(name, asked.device)
    cells = {"bins": asked.bins, "groups": asked.groups, "batch_size": asked.batch_size}
    rows = {"plain": lambda: plain(model, data, **cells)}
    for row, settings in ENGINES.items():
        mode, engine = settings["mode"], {k: v for k, v in settings.items() if k != "mode"}
        options = MeasurementOptions(**cells, **engine, memory=asked.memory)
        if row != "exact" or fits(model, data, options):
            Measurement(model, data, options, mode)  # refused now, and not after the warm-up
            rows[row] = partial(measure, model, data, options, mode=mode)
    plain(model, data, 1, 1, asked.batch_size)  # warms up
    times, results = take_turns(rows, asked.repeat, asked.device)
    maps = {row: result for row, result in results.items() if isinstance(result, ConflictMap)}
    clock = CPU if asked.device == "cpu" else CLOCK
    return [
        {
            "model": name,
            "parameters": model.parameters,
            "row": row,
            "seconds": median(times, row, clock),
            "overhead": ratio(times, row, "plain", clock),
            "rmse": rmse(maps, row),
        }
        for row in rows
    ]


def fits(model: Diffusion, data: ImageData, options: MeasurementOptions) -> bool:
    """Return whether what a measurement stores fits its memory."""
    try:
        Measurement(model, data, options)
    except ResourceError:
        return False
    return True


def rmse(maps: dict[str, ConflictMap], row: str) -> float | None:
    """Return how far the cosines of a row lie from the exact ones."""
    if row not in maps or "exact" not in maps:
        return None
    return float(np.sqrt(np.mean((cosines(maps[row]) - cosines(maps["exact"])) ** 2)))


def main() -> None:
    """Compare the models that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", default="digits,small", help=f"of {', '.join(MODELS)}, comma-separated"
    )
    parser.add_argument("--bins", type=int, default=4)
    parser.add_argument("--groups", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--memory", type=float, default=2.0, help="GB that gradients or their sketches may take"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    try:
        lines = [line for name in asked.models.split(",") for line in compare(name, asked)]
    except (UsageError, ResourceError) as error:
        parser.error(str(error))
    show(lines)
    if asked.json:
        ratio = next(line["overhead"] for line in reversed(lines) if line["row"] == "sketch flat")
        settings = {name: value for name, value in vars(asked).items() if name != "json"}
        json.dump({**settings, "overhead_ratio": ratio, "rows": lines}, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
