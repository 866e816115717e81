"""What the merge engine is measured against: naive torch loops, mergekit 0.1.5 and sd-mecha 1.1.8,
one merge per process.

    python peers.py WHO METHOD OUT FISHERS BASE EXPERT...

It imports nothing of demerge, so that it runs in the interpreters of the others. It exits with 99
where WHO has no METHOD."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

NOT_OFFERED = 99
DENSITY = 0.2
Load = Callable[[str], Tensor]


def average(base: Tensor, experts: list[Tensor]) -> Tensor:
    """Return the mean of the experts."""
    total = experts[0].float()
    for expert in experts[1:]:
        total += expert.float()
    return total / len(experts)


def task_arithmetic(base: Tensor, experts: list[Tensor]) -> Tensor:
    """Return the base and 0.3 of each task vector."""
    origin = base.float()
    merged = origin.clone()
    for expert in experts:
        merged += 0.3 * (expert.float() - origin)
    return merged


def ties(base: Tensor, experts: list[Tensor], thresholds: list[Tensor] | None = None) -> Tensor:
    """Trim below the thresholds (default: the tensor's), elect by mass, average what agrees."""
    origin = base.float()
    deltas = torch.stack([expert.float() - origin for expert in experts])
    magnitudes = deltas.abs()
    if thresholds is None:
        thresholds = [largest(m.view(-1)) for m in magnitudes]
    for delta, magnitude, bound in zip(deltas, magnitudes, thresholds, strict=True):
        delta *= (magnitude >= bound).float()
    sign = deltas.sum(0).sign()
    sign += sign.sum().sign() * (sign == 0).float()
    agree = (deltas * sign > 0).float()
    return origin + (deltas * agree).sum(0) / agree.sum(0).clamp_min(1)


def largest(magnitudes: Tensor) -> Tensor:
    """Return the k-th largest magnitude."""
    n = len(magnitudes)
    return magnitudes.kthvalue(n - max(1, int(DENSITY * n)) + 1).values


def dare(base: Tensor, experts: list[Tensor]) -> Tensor:
    """Return DARE with half of the entries dropped."""
    origin = base.float()
    merged = origin.clone()
    for expert in experts:
        delta = expert.float() - origin
        merged += delta * torch.bernoulli(torch.full_like(delta, 0.5)) / 0.5 / len(experts)
    return merged


def fisher(base: Tensor, experts: list[Tensor], fishers: list[Tensor]) -> Tensor:
    """Return the mean weighted by the Fishers."""
    total, mass = torch.zeros(base.shape), torch.zeros(base.shape)
    for expert, weight in zip(experts, fishers, strict=True):
        total += weight * expert.float()
        mass += weight
    return total / mass.clamp_min(1e-30)


NAIVE = {"average": average, "task_arithmetic": task_arithmetic, "ties-tensor": ties, "dare": dare}


def merged(
    method: str, names: list[str], base: Load, experts: list[Load], fishers: list[Load]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the merge, tensor by tensor, in the dtype of the base."""
    thresholds = None
    if method == "ties-model":
        thresholds = [
            largest(
                torch.cat([(expert(n).float() - base(n).float()).abs().view(-1) for n in names])
            )
            for expert in experts
        ]
    for name in names:
        theta, tuned = base(name), [expert(name) for expert in experts]
        if method == "ties-model":
            found = ties(theta, tuned, thresholds)
        elif method == "fisher":
            found = fisher(theta, tuned, [load(name) for load in fishers])
        else:
            found = NAIVE[method](theta, tuned)
        yield name, found.to(theta.dtype)


def naive_ram(method: str, out: Path, fishers: list[Path], base: Path, experts: list[Path]) -> None:
    """Merge with everything in memory."""
    from safetensors.torch import load, save_file

    def held(path: Path) -> dict[str, Tensor]:
        return load(path.read_bytes())

    origin, tuned = held(base), [held(path) for path in experts]
    weights = [held(path) for path in fishers] if method == "fisher" else []
    found = merged(
        method,
        list(origin),
        origin.__getitem__,
        [t.__getitem__ for t in tuned],
        [w.__getitem__ for w in weights],
    )
    save_file(dict(found), out)


def naive_stream(
    method: str, out: Path, fishers: list[Path], base: Path, experts: list[Path]
) -> None:
    """Merge tensor by tensor from mapped files, and write each as it is made."""
    from safetensors import safe_open

    origin, *tuned = [safe_open(path, "pt") for path in (base, *experts)]
    weights = [safe_open(path, "pt") for path in fishers] if method == "fisher" else []
    names = list(origin.keys())
    with out.open("wb") as stream:
        stream.write(header({name: origin.get_slice(name).get_shape() for name in names}))
        loads = [[file.get_tensor for file in files] for files in (tuned, weights)]
        for _, tensor in merged(method, names, origin.get_tensor, *loads):
            stream.write(tensor.numpy().data)


def header(shapes: dict[str, list[int]]) -> bytes:
    """Return the header of a safetensors file of float16."""
    table, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        table[name] = {
            "dtype": "F16",
            "shape": shape,
            "data_offsets": [position, position := position + size],
        }
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
    result = CliRunner().invoke(
        main, [str(file), str(folder), "--safe-serialization", "--quiet"], catch_exceptions=False
    )
    sys.exit(result.exit_code)


def sd_mecha(method: str, out: Path, fishers: list[Path], base: Path, experts: list[Path]) -> None:
    """Merge with sd-mecha, which must be told the tensors: else it writes only some."""
    import sd_mecha as mecha
    from safetensors import safe_open
    from sd_mecha.extensions.builtin.merge_methods import linear, ties
    from sd_mecha.extensions.model_configs import from_yaml, register

    with safe_open(base, "pt") as file:
        keys = {
            n: {"shape": file.get_slice(n).get_shape(), "dtype": "float16"}
            for n in file.keys()  # noqa: SIM118
        }
    register(
        config := from_yaml(json.dumps({"identifier": "the-unet", "components": {"unet": keys}}))
    )
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
    mecha.merge(
        recipe,
        output=out,
        merge_dtype=torch.float32,
        output_dtype=torch.float16,
        merge_device="cpu",
        threads=1,
    )


PEERS = {
    "naive-ram": naive_ram,
    "naive-stream": naive_stream,
    "mergekit": mergekit,
    "sd-mecha": sd_mecha,
}


def main() -> None:
    """Run one merge."""
    who, method, out, fishers, base, *experts = sys.argv[1:]
    torch.set_num_threads(1)
    PEERS[who](
        method,
        Path(out),
        [Path(path) for path in fishers.split(",")],
        Path(base),
        [Path(path) for path in experts],
    )


if __name__ == "__main__":
    main()
