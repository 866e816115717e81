"""What the benchmarks share: models with data, rows that work in turns, and a table."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

from demerge.data import ImageData, load_images
from demerge.diffusion.model import Diffusion

MODELS = ("digits", "small", "cifar10")
Times = dict[str, list[tuple[float, float]]]  # of each row: seconds of the clock, and of the CPU
CLOCK, CPU = 0, 1


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


def take_turns(
    rows: Mapping[str, Callable[[], object]], repeat: int, device: str
) -> tuple[Times, dict[str, object]]:
    """Run each row once in a turn; return the seconds of all runs, and the last results."""
    times: Times = {row: [] for row in rows}
    results: dict[str, object] = {}
    for _ in range(repeat):
        for row, work in rows.items():
            _wait(device)
            start, cpu = time.perf_counter(), time.process_time()
            results[row] = work()
            _wait(device)
            times[row].append((time.perf_counter() - start, time.process_time() - cpu))
    return times, results


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def median(times: Times, row: str, clock: int) -> float:
    """Return the median of a row's seconds."""
    return statistics.median(run[clock] for run in times[row])


def ratio(times: Times, row: str, floor: str, clock: int) -> float:
    """Return the median over the turns of a row's seconds over those of another row."""
    pairs = zip(times[row], times[floor], strict=True)
    return statistics.median(own[clock] / other[clock] for own, other in pairs)


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
