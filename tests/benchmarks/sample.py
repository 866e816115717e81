"""What drawing images costs next to the stock pipeline of the same model, steps and batch.

    OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/sample.py --models digits small
    .venv/bin/python tests/benchmarks/sample.py --device cuda --models cifar10 --batch-size 128 --mixed-precision bf16

Rows: `stock`, the pipeline DDIMPipeline of diffusers in float32; `ours`, without a graph; `routed`, four copies of the model as
a routed ensemble; and on a GPU `graph` and `routed graph`, the denoiser's pass as CUDA graphs. With --mixed-precision our rows
run in that precision, and `stock amp` is the stock pipeline under autocast. All rows draw their images in turns. `ratio` is the
median over the turns of a row's seconds over those of the stock pipeline in the same turn, on the CPU seconds of the CPU;
`images` is images per second; `first` the seconds of the first batch, on a GPU with the capture of its graphs. `--json` prints one
document; its `overhead_ratio` is that of `ours` on the last model.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable

import diffusers
import torch
from turns import CLOCK, CPU, MODELS, load, median, ratio, show, take_turns

from demerge.diffusion.ensemble import routed
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import DTYPES
from demerge.diffusion.options import SamplingOptions
from demerge.diffusion.sampling import ImageSampler, make_scheduler
from demerge.timesteps import Partition

EXPERTS = 4
Turn = Callable[[], object]


def stock(model: Diffusion, o: SamplingOptions, precision: str) -> Turn:
    """Return a function that draws a batch with diffusers' own pipeline."""
    pipeline = diffusers.DDIMPipeline(model.denoiser, make_scheduler(model, o.steps, "ddim"))
    pipeline.set_progress_bar_config(disable=True)
    dtype, kind = DTYPES[precision], model.device.type

    def turn() -> object:
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            return pipeline(o.batch_size, num_inference_steps=o.steps, output_type="np")

    return turn


def ours(model: Diffusion, o: SamplingOptions, *, graph: bool) -> Turn:
    """Return a function that draws a batch with demerge."""
    sampler = ImageSampler(model, o)
    sampler.forward.captures &= graph
    return lambda: sampler.draw(range(o.batch_size))


def compare(name: str, asked: argparse.Namespace) -> list[dict[str, object]]:
    """Return a line for the stock pipeline of a model and one for each way of ours."""
    model, _ = load(name, asked.device)
    model.denoiser.eval().requires_grad_(False)
    o = SamplingOptions(
        steps=asked.steps, batch_size=asked.batch_size, mixed_precision=asked.mixed_precision
    )
    experts = [model.denoiser, *(copy.deepcopy(model.denoiser) for _ in range(EXPERTS - 1))]
    ensemble = routed(model, Partition.uniform(model.T, EXPERTS), experts)
    turns = {"stock": stock(model, o, "no"), "ours": ours(model, o, graph=False)}
    turns["routed"] = ours(ensemble, o, graph=False)
    if asked.mixed_precision != "no":
        turns["stock amp"] = stock(model, o, asked.mixed_precision)
    if asked.device.startswith("cuda"):
        turns["graph"] = ours(model, o, graph=True)
        turns["routed graph"] = ours(ensemble, o, graph=True)
    first: dict[str, float] = {}
    for row, turn in turns.items():
        start = time.perf_counter()
        turn()
        first[row] = time.perf_counter() - start
    times, _ = take_turns(turns, asked.repeat, asked.device)
    clock = CPU if asked.device == "cpu" else CLOCK
    return [
        {
            "model": name,
            "row": row,
            "ms per step": 1e3 * median(times, row, clock) / o.steps,
            "images": o.batch_size / median(times, row, clock),
            "ratio": ratio(times, row, "stock", clock),
            "first": first[row],
        }
        for row in turns
    ]


def main() -> None:
    """Compare the chosen models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["digits", "small"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps")
    parser.add_argument("--repeat", type=int, default=9, help="turns")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.device == "cpu":
        torch.set_num_threads(1)
    lines = [line for name in asked.models for line in compare(name, asked)]
    show(lines)
    if asked.json:
        ratio = next(line["ratio"] for line in reversed(lines) if line["row"] == "ours")
        json.dump({"overhead_ratio": ratio, "lines": lines}, sys.stdout)


if __name__ == "__main__":
    main()
