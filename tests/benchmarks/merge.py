"""How fast the merge engine is and how much memory it takes, next to a floor and to others, in
one run.

    .venv/bin/python tests/benchmarks/merge.py --size sd15-half --repeat 3

makes a base and four experts in float16, random weights in the shapes of a real model, and runs
each row in a process of its own: the floor (`cat` of the inputs, `cp` of one), naive torch loops
(`peers.py`), ours with hashes known and unknown, and mergekit 0.1.5 and sd-mecha 1.1.8 where
`--mergekit PYTHON` and `--sd-mecha PYTHON` name interpreters that have them. `demerge-lora` is
ours with experts as LoRA of rank 16 on all matrices and kernels, `demerge-two` ours
with `--num-workers 2`, `demerge-pair` two merges of one worker at once: what two cores give at all. The
table holds medians of CPU seconds with start-up, wall seconds, the peak of anonymous memory (of
several processes at most this, since they share some), gigabytes read and written per CPU second,
and the CPU seconds relative to the naive streamed loop."""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from itertools import accumulate
from pathlib import Path

PEERS = Path(__file__).resolve().with_name("peers.py")
EXPERTS = 4
RANK = 16
METHODS = {
    "average": "--method average",
    "task_arithmetic": "--method task_arithmetic --weights 0.3,0.3,0.3,0.3",
    "ties-tensor": "--method ties --option scope=tensor",
    "ties-model": "--method ties --option scope=model",
    "dare": "--method dare",
    "fisher": "--method fisher",
}
HALF = 425_000_000
NOT_OFFERED = 99  # the exit code of a peer that does not have the method


@dataclass(frozen=True)
class Row:
    """A process to be measured: who merges, by which method, and how it is started."""

    who: str
    method: str
    command: tuple[str, ...]
    forgets: bool = False  # whether the hashes that an earlier run left are removed first


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    cpu_s: float
    wall_s: float
    anonymous_gb: float


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors of google/ddpm-ema-church-256 or Stable Diffusion 1.5."""
    import diffusers
    import torch

    church = {
        "sample_size": 256,
        "block_out_channels": (128, 128, 256, 256, 512, 512)
        if size == "church"
        else (16, 16, 32, 32, 32, 32),
        "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    }
    with torch.device("meta"):
        sd15 = size.startswith("sd15")
        model = (
            diffusers.UNet2DConditionModel(cross_attention_dim=768)
            if sd15
            else diffusers.UNet2DModel(**church)
        )
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ends = accumulate(math.prod(shape) for shape in tensors.values())
    return {
        n: shape
        for (n, shape), end in zip(tensors.items(), ends, strict=True)
        if size != "sd15-half" or end <= HALF
    }


def make(folder: Path, size: str) -> None:
    """Write base, expert0.. and fisher0.. as safetensors: weights of 0.05, moved by 0.001."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    sizes = shapes(size)

    def normal(scale: float) -> dict[str, torch.Tensor]:
        return {
            name: torch.randn(shape, generator=generator).mul_(scale)
            for name, shape in sizes.items()
        }

    base = {name: tensor.half() for name, tensor in normal(0.05).items()}
    save_file(base, folder / "base.safetensors")
    for i in range(EXPERTS):
        moved = {name: (base[name] + move).half() for name, move in normal(0.001).items()}
        save_file(moved, folder / f"expert{i}.safetensors")
        del moved
        save_file(
            {name: t.square_() for name, t in normal(0.001).items()},
            folder / f"fisher{i}.safetensors",
        )
        factors = {}
        for name, shape in sizes.items():
            if len(shape) > 1:
                module, down = name.removesuffix(".weight"), (RANK, *shape[1:])
                up = (shape[0], RANK, *[1] * (len(shape) - 2))
                for key, size in (("lora_A", down), ("lora_B", up)):
                    factor = torch.randn(size, generator=generator).mul_(0.01)
                    factors[f"unet.{module}.{key}.weight"] = factor.half()
        save_file(factors, folder / f"lora{i}.safetensors")


def rows(folder: Path, methods: list[str], peers: dict[str, str]) -> Iterator[Row]:
    """Yield what is to be measured."""
    inputs = [
        str(folder / f"{name}.safetensors")
        for name in ("base", *(f"expert{i}" for i in range(EXPERTS)))
    ]
    fishers = ",".join(str(folder / f"fisher{i}.safetensors") for i in range(EXPERTS))
    out, second = str(folder / "out.safetensors"), str(folder / "out2.safetensors")
    yield Row(
        "floor",
        "cat + cp",
        ("sh", "-c", f"cat {' '.join(inputs)} > /dev/null; cp {inputs[0]} {out}"),
    )
    for method in methods:
        for who, python in {
            "naive-ram": sys.executable,
            "naive-stream": sys.executable,
            **peers,
        }.items():
            yield Row(who, method, (python, str(PEERS), who, method, out, fishers, *inputs))
        given = ["--option", f"fisher={fishers}"] if method == "fisher" else []
        ours = (
            sys.executable,
            "-m",
            "demerge.cli.main",
            "merge",
            *inputs,
            *METHODS[method].split(),
            *given,
            "-o",
            out,
        )
        one = (*ours, "--num-workers", "1")
        if method in (methods[0], "fisher"):  # which reads other files too
            yield Row("demerge-hashing", method, one, forgets=True)
        yield Row("demerge", method, one)
        if method != "fisher":
            loras = [name.replace("expert", "lora") for name in inputs]
            yield Row("demerge-lora", method, (*ours[:4], *loras, *one[4 + len(inputs) :]))
        yield Row("demerge-two", method, (*ours, "--num-workers", "2"))
        yield Row(
            "demerge-pair",
            method,
            (
                "sh",
                "-c",
                f"{shlex.join(one)} & {shlex.join((*one, '-o', second))} && wait $!",
            ),
        )


def measure(row: Row, folder: Path) -> Cost | None:
    """Run a row once; None where its program does not have the method."""
    for stray in [*folder.glob("out*"), *([folder / "cache"] if row.forgets else [])]:
        shutil.rmtree(stray, ignore_errors=True) if stray.is_dir() else stray.unlink(
            missing_ok=True
        )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            row.command, env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.005)
        wall = time.perf_counter() - start
        errors.seek(0)
        if process.returncode not in (0, NOT_OFFERED):
            raise SystemExit(f"{row.who} {row.method} failed:\n{errors.read().decode()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu, wall, peak / 1e9) if process.returncode == 0 else None


def anonymous(pid: int) -> int:
    """Return the anonymous memory of a process and its children in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
    return own + sum(anonymous(int(child)) for child in children)


def table(runs: dict[Row, list[Cost]], traffic: dict[str, float]) -> list[dict[str, object]]:
    """Return a line for each row: medians, also relative to the naive streamed loop."""
    medians = {
        row: Cost(*map(statistics.median, zip(*map(astuple, costs), strict=True)))
        for row, costs in runs.items()
    }
    naive = {row.method: cost.cpu_s for row, cost in medians.items() if row.who == "naive-stream"}
    return [
        {
            "who": row.who,
            "method": row.method,
            **asdict(cost),
            "gb_per_cpu_s": traffic.get(row.method, traffic["cat + cp"]) / cost.cpu_s,
            "cpu_over_naive": cost.cpu_s / naive[row.method] if row.method in naive else None,
        }
        for row, cost in medians.items()
    ]


def main() -> None:
    """Measure the rows in turns; print a table on stderr, with --json a document on stdout."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["tiny", "church", "sd15-half", "sd15"], default="tiny")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="keep the workload here, or use the one that is here"
    )
    parser.add_argument("--mergekit", metavar="PYTHON")
    parser.add_argument("--sd-mecha", metavar="PYTHON")
    parser.add_argument(
        "--only", help="comma-separated: the rows of these alone, for example demerge"
    )
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "base.safetensors").exists():
            make(folder, asked.size)
        peers = {
            who: python
            for who, python in (("mergekit", asked.mergekit), ("sd-mecha", asked.sd_mecha))
            if python
        }
        planned = rows(folder, asked.methods.split(","), peers)
        chosen = [row for row in planned if not asked.only or row.who in asked.only.split(",")]
        runs: dict[Row, list[Cost]] = {}
        for _ in range(asked.repeat):
            for row in chosen:
                cost = measure(row, folder)
                if cost is not None:
                    runs.setdefault(row, []).append(cost)
        models = (EXPERTS + 2) * (folder / "base.safetensors").stat().st_size / 1e9
        fishers = sum(path.stat().st_size for path in folder.glob("fisher*")) / 1e9
    lines = table(runs, {"cat + cp": models, "fisher": models + fishers})
    show(lines)
    if asked.json:
        json.dump({"size": asked.size, "repeat": asked.repeat, "rows": lines}, sys.stdout, indent=2)


def show(lines: list[dict[str, object]]) -> None:
    """Print the lines as a table of Markdown on stderr."""
    names = list(lines[0])
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", file=sys.stderr)
    for line in lines:
        cells = (
            f"{value:.2f}" if isinstance(value, float) else str(value or "")
            for value in line.values()
        )
        print(f"| {' | '.join(cells)} |", file=sys.stderr)


if __name__ == "__main__":
    main()
