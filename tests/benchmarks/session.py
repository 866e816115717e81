"""What a merge in memory takes on a device, next to the CPU.

    .venv/bin/python tests/benchmarks/session.py --models cifar10 --device cuda

makes four experts of a model by random moves of its weights and opens a `MergeSession` for each
method, on the CPU and on the device. Rows: `open` computes the deltas, `apply` writes the merged
weights into the module, `gradient` takes a loss of the merged model and its gradient in the four
merge weights. `seconds` is the median on the device, `cpu` one run on the CPU, `speedup` their ratio.
`--json` prints one document.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from turns import MODELS, load, show

from demerge.merging.session import MergeSession

METHODS = ("task_arithmetic", "ties", "dare")
EXPERTS = 4


def experts_of(module: nn.Module) -> list[dict[str, Tensor]]:
    """Return the weights of four experts, each moved by 1 % of a weight's spread."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            name: tensor + 0.01 * tensor.std(correction=0) * noise_like(tensor, generator)
            for name, tensor in module.state_dict().items()
        }
        for _ in range(EXPERTS)
    ]


def noise_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal noise of the shape of a tensor."""
    return torch.randn(tensor.shape, generator=generator)


def seconds(work: Callable[[], object], device: str, repeat: int) -> float:
    """Return the median of the seconds of some runs; a GPU warms up by one more."""
    times, warm_up = [], int(device != "cpu")
    for _ in range(warm_up + repeat):
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def measure(
    module: nn.Module, experts: list[dict[str, Tensor]], method: str, device: str, repeat: int
) -> dict[str, float]:
    """Return the seconds of each row on a device."""
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    live = copy.deepcopy(module).to(device).requires_grad_(False)
    session = MergeSession(base, experts, device, method=method)
    side, channels = live.config.sample_size, live.config.in_channels
    x = torch.randn(4, channels, side, side, device=device)
    t = torch.arange(4, device=device) * 100
    w = torch.full((EXPERTS,), 0.25, device=device)

    def gradient() -> None:
        weights = w.clone().requires_grad_(True)
        session.call(live, weights, x, t).sample.square().mean().backward()

    rows: dict[str, Callable[[], object]] = {
        "open": lambda: MergeSession(base, experts, device, method=method),
        "apply": lambda: session.apply(w, live),
        "gradient": gradient,
    }
    return {row: seconds(work, device, repeat) for row, work in rows.items()}


def compare(name: str, asked: argparse.Namespace) -> list[dict[str, object]]:
    """Return a line for each method and row of a model."""
    model, _ = load(name, "cpu")
    experts = experts_of(model.denoiser)
    lines: list[dict[str, object]] = []
    for method in asked.methods:
        cpu = measure(model.denoiser, experts, method, "cpu", 1)
        own = cpu
        if asked.device != "cpu":
            own = measure(model.denoiser, experts, method, asked.device, asked.repeat)
        for row, value in own.items():
            line = {"model": name, "method": method, "row": row, "seconds": value}
            lines.append({**line, "cpu": cpu[row], "speedup": cpu[row] / value})
    return lines


def main() -> None:
    """Compare the chosen models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["digits", "small"])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    lines = [line for name in asked.models for line in compare(name, asked)]
    show(lines)
    if asked.json:
        json.dump({"device": asked.device, "lines": lines}, sys.stdout)


if __name__ == "__main__":
    main()
