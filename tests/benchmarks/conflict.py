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
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from demerge.analysis.measurement.gradients import Measurement
from demerge.analysis.measurement.options import MeasurementOptions
from demerge.analysis.measurement.run import measure
from demerge.analysis.measurement.samples import Draws
from demerge.conflict import ConflictMap
from demerge.data import ImageData, load_images
from demerge.diffusion.model import Diffusion
from demerge.errors import ResourceError, UsageError
from demerge.timesteps import Partition

MODELS = ("digits", "small", "cifar10")
ENGINES: dict[str, dict[str, Any]] = {
    "exact": {"engine": "exact", "mode": "flat"},
    "sketch flat": {"engine": "sketch", "mode": "flat"},
    "sketch hooks": {"engine": "sketch", "mode": "hooks"},
    "sketch layers": {"engine": "sketch", "mode": "flat", "layers": True},
}


def load(name: str, device: str) -> tuple[Diffusion, ImageData]:
    """Make a model, with data of its shape."""
    if name == "digits":
        return Diffusion.load("digits-base", device=device), load_images("digits", split="train")
    import diffusers

    torch.manual_seed(0)
    config = {
        "sample_size": 32,
        "block_out_channels": (32, 64, 64) if name == "small" else (128, 256, 256, 256),
        "norm_num_groups": 32,
        "attention_head_dim": None if name == "cifar10" else 8,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"]
        + ["DownBlock2D"] * (1 if name == "small" else 2),
        "up_block_types": ["UpBlock2D"] * (1 if name == "small" else 2)
        + ["AttnUpBlock2D", "UpBlock2D"],
    }
    model = Diffusion(diffusers.UNet2DModel(**config), diffusers.DDPMScheduler()).to(device)
    return model, load_images("digits", split="train", resolution=32, channels=3)


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


def seconds(work: Callable[[], object], device: str) -> tuple[float, object]:
    """Run and time: CPU seconds on the CPU, seconds of the clock elsewhere."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = clock()
    result = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - start, result


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
    times: dict[str, list[float]] = {row: [] for row in rows}
    maps: dict[str, ConflictMap] = {}
    for _ in range(asked.repeat):
        for row, work in rows.items():
            took, result = seconds(work, asked.device)
            times[row].append(took)
            if isinstance(result, ConflictMap):
                maps[row] = result
    return [
        {
            "model": name,
            "parameters": model.parameters,
            "row": row,
            "seconds": statistics.median(times[row]),
            "overhead": statistics.median(
                t / p for t, p in zip(times[row], times["plain"], strict=True)
            ),
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


def show(lines: list[dict[str, object]]) -> None:
    """Print the lines as a table of Markdown on stderr."""
    names = list(lines[0])
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", file=sys.stderr)
    for line in lines:
        cells = (
            f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)
            for value in line.values()
        )
        print(f"| {' | '.join(cells)} |", file=sys.stderr)


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
