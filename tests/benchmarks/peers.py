"""What the merge engine is measured against: naive torch loops, mergekit 0.1.5 and sd-mecha 1.1.8, one merge per process.

    python peers.py WHO METHOD OUT FISHERS BASE EXPERT...

It imports nothing of demerge, so that it runs in the interpreters of the others. It exits with 99 where WHO has no METHOD.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

NOT_OFFERED = 99
DENSITY = 0.2
Merged = Callable[[Tensor, Tensor, "list[Tensor]"], Tensor]


def average(base: Tensor, deltas: Tensor, fishers: list[Tensor]) -> Tensor:
    """Return the mean of the experts."""
    return base + deltas.mean(0)


def task_arithmetic(base: Tensor, deltas: Tensor, fishers: list[Tensor]) -> Tensor:
    """Return the base and 0.3 of each task vector."""
    return base + (0.3 * deltas).sum(0)


def ties(base: Tensor, deltas: Tensor, thresholds: Tensor) -> Tensor:
    """Trim below the thresholds [K], elect by mass, average what agrees."""
    trimmed = torch.where(deltas.abs() >= thresholds.view(-1, *[1] * base.ndim), deltas, 0.0)
    sign = trimmed.sum(0).sign()
    majority = sign.sum().sign()
    sign = torch.where(sign == 0, majority, sign)
    agree = (trimmed * sign > 0).to(trimmed.dtype)
    return base + (trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)


def ties_tensor(base: Tensor, deltas: Tensor, fishers: list[Tensor]) -> Tensor:
    """Return TIES with the threshold of each tensor."""
    flat = deltas.abs().flatten(1)
    k = max(1, int(DENSITY * flat.shape[1]))
    return ties(base, deltas, flat.kthvalue(flat.shape[1] - k + 1, dim=1).values)


def dare(base: Tensor, deltas: Tensor, fishers: list[Tensor]) -> Tensor:
    """Return DARE with half of the entries dropped."""
    return base + (deltas * (torch.rand_like(deltas) < 0.5) / 0.5).mean(0)


def fisher(base: Tensor, deltas: Tensor, fishers: list[Tensor]) -> Tensor:
    """Return the mean weighted by the Fishers."""
    importance = torch.stack(fishers)
    return base + (importance * deltas).sum(0) / importance.sum(0).clamp_min(1e-30)


NAIVE: dict[str, Merged] = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "ties-tensor": ties_tensor,
    "dare": dare,
    "fisher": fisher,
}


def naive_ram(method: str, out: Path, fishers: list[Path], base: Path, experts: list[Path]) -> None:
    """Merge with everything in memory."""
    from safetensors.torch import load, save_file

    def held(path: Path) -> dict[str, Tensor]:
        return load(path.read_bytes())

    origin, tuned = held(base), [held(path) for path in experts]
    weights = [held(path) for path in fishers] if method == "fisher" else []

    def deltas(name: str) -> Tensor:
        return torch.stack([expert[name].float() for expert in tuned]) - origin[name].float()

    if method == "ties-model":
        bounds = global_thresholds([[(deltas(name)[i]) for name in origin] for i in range(len(tuned))])
        save_file({n: ties(t.float(), deltas(n), bounds).to(t.dtype) for n, t in origin.items()}, out)
    else:
        step = NAIVE[method]
        save_file({n: step(t.float(), deltas(n), [w[n] for w in weights]).to(t.dtype) for n, t in origin.items()}, out)


def naive_stream(method: str, out: Path, fishers: list[Path], base: Path, experts: list[Path]) -> None:
    """Merge tensor by tensor from mapped files, and write each as it is made."""
    from safetensors import safe_open

    origin, *tuned = [safe_open(path, "pt") for path in (base, *experts)]
    weights = [safe_open(path, "pt") for path in fishers] if method == "fisher" else []

    def delta(expert: object, name: str) -> Tensor:
        return expert.get_tensor(name).float() - origin.get_tensor(name).float()  # type: ignore[attr-defined]

    names = list(origin.keys())
    bounds = None
    if method == "ties-model":
        bounds = torch.stack([global_thresholds([[delta(expert, name) for name in names]])[0] for expert in tuned])
    with out.open("wb") as stream:
        stream.write(header({name: origin.get_slice(name).get_shape() for name in names}))
        for name in names:
            theta = origin.get_tensor(name)
            deltas = torch.stack([delta(expert, name) for expert in tuned])
            if bounds is not None:
                merged = ties(theta.float(), deltas, bounds)
            else:
                merged = NAIVE[method](theta.float(), deltas, [w.get_tensor(name) for w in weights])
            stream.write(merged.to(theta.dtype).numpy().data)


def global_thresholds(deltas: list[list[Tensor]]) -> Tensor:
    """Return the k-th largest magnitude of each model's deltas."""
    found = []
    for model in deltas:
        flat = torch.cat([delta.abs().view(-1) for delta in model])
        found.append(flat.kthvalue(len(flat) - max(1, int(DENSITY * len(flat))) + 1).values)
    return torch.stack(found)


def header(shapes: dict[str, list[int]]) -> bytes:
    """Return the header of a safetensors file of float16."""
    table, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        table[name] = {"dtype": "F16", "shape": shape, "data_offsets": [position, position := position + size]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def mergekit(method: str, out: Path, fishers: list[Path], base: Path, experts: list[Path]) -> None:
    """Merge with mergekit's command for raw checkpoints."""
    from click.testing import CliRunner
    from mergekit.scripts.merge_raw_pytorch import main

    kinds = {
        "average": ("linear", {"weight": 1.0}, {"normalize": True}),
        "task_arithmetic": ("task_arithmetic", {"weight": 0.3}, {"normalize": False}),
        "ties-tensor": ("ties", {"weight": 0.25, "density": DENSITY}, {"normalize": True}),
        "dare": ("dare_linear", {"weight": 0.25, "density": 0.5}, {"normalize": False}),
    }
    if method not in kinds:
        sys.exit(NOT_OFFERED)
    kind, each, every = kinds[method]
    config = {
        "merge_method": kind,
        "dtype": "float32",
        "out_dtype": "float16",
        "models": [{"model": str(path), "parameters": each} for path in experts],
        "parameters": every,
        **({} if method == "average" else {"base_model": str(base)}),
    }
    file = out.with_suffix(".mergekit.json")
    file.write_text(json.dumps(config))
    folder = out.with_suffix(".mergekit")
    result = CliRunner().invoke(main, [str(file), str(folder), "--safe-serialization", "--quiet"], catch_exceptions=False)
    sys.exit(result.exit_code)


def sd_mecha(method: str, out: Path, fishers: list[Path], base: Path, experts: list[Path]) -> None:
    """Merge with sd-mecha, told which tensors there are: of a model it does not know it writes only some."""
    import sd_mecha as mecha
    from safetensors import safe_open
    from sd_mecha.extensions.builtin.merge_methods import linear, ties
    from sd_mecha.extensions.model_configs import from_yaml, register

    with safe_open(base, "pt") as file:
        keys = {n: {"shape": file.get_slice(n).get_shape(), "dtype": "float16"} for n in file.keys()}  # noqa: SIM118
    register(config := from_yaml(json.dumps({"identifier": "the-unet", "components": {"unet": keys}})))
    origin, *tuned = [mecha.model(path, config=config) for path in (base, *experts)]
    deltas = [linear.subtract(model, origin) for model in tuned]
    if method == "average":
        recipe = linear.n_average(*tuned)
    elif method == "task_arithmetic":
        recipe = origin
        for delta in deltas:
            recipe = linear.add_difference(recipe, delta, alpha=0.3)
    elif method == "ties-tensor":
        recipe = linear.add_difference(origin, ties.ties_sum(*deltas, k=DENSITY), alpha=1.0)
    else:
        sys.exit(NOT_OFFERED)
    mecha.merge(recipe, output=out, merge_dtype=torch.float32, output_dtype=torch.float16, merge_device="cpu", threads=1)


PEERS = {"naive-ram": naive_ram, "naive-stream": naive_stream, "mergekit": mergekit, "sd-mecha": sd_mecha}


def main() -> None:
    """Run one merge."""
    who, method, out, fishers, base, *experts = sys.argv[1:]
    torch.set_num_threads(1)
    PEERS[who](method, Path(out), [Path(path) for path in fishers.split(",")], Path(base), [Path(path) for path in experts])


if __name__ == "__main__":
    main()
