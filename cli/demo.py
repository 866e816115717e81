"""`demerge demo`: the whole path on the embedded default, by running the very commands a user would.

The base (a UNet of 0.2 M parameters, trained for 400 steps on scikit-learn's digits) ships in the package, next to a
converged one; nothing is downloaded. The commands are printed as they run, and again in the report, and can be copied.
Commands that do not wait for each other run as processes side by side if the machine has the cores.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Json, Seed, cores, emit, say

BASES = ("digits-early", "digits-base")
MERGES = {
    "average": "--method average",
    "task-arithmetic": "--method task_arithmetic --weights 0.5,0.5,0.5,0.5",
    "ties": "--method ties --option density=0.5",
    "dare": "--method dare --option density=0.5",
    "fisher": "--method fisher",
}


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run.")] = Path(
        "runs/demo"
    ),
    base: Annotated[
        str,
        typer.Option(
            "--base",
            help="digits-early, whose timesteps conflict, or digits-base, which is converged.",
        ),
    ] = BASES[0],
    steps: Annotated[
        int,
        typer.Option(
            "--steps",
            min=1,
            help="Training steps per expert; the joint control gets 4 times as many.",
        ),
    ] = 150,
    num_images: Annotated[
        int, typer.Option("--num-images", min=65, help="Images per model and seed.")
    ] = 200,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of sampling seeds.")] = 5,
    sampling_steps: Annotated[
        int, typer.Option("--sampling-steps", min=1, help="DDIM steps.")
    ] = 12,
    cell_size: Annotated[
        int, typer.Option("--cell-size", min=1, help="Images per cell of the conflict map.")
    ] = 96,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Walk the whole path offline, in some three minutes: conflict map, ranges, experts, merges, an honest report."""
    start = time.monotonic()
    say(
        "demerge demo: one diffusion model of handwritten digits becomes four experts and merged models"
    )
    from demerge.errors import UsageError
    from demerge.storage.atomic import commit_json

    if base not in BASES:
        raise UsageError(
            f"--base '{base}' is not a base of digits", fix=f"give {' or '.join(BASES)}"
        )
    ran: list[str] = []
    for together in commands(out, base, steps, num_images, seeds, sampling_steps, cell_size, seed):
        for command in together:
            ran.append(f"demerge {command}")
            say(f"\n[{time.monotonic() - start:3.0f} s] $ {ran[-1]}")
        if together[0].startswith("compare"):
            commit_json(out / "commands.json", {"commands": ran})
        words = [shlex.split(command) for command in together]
        run([w for w in words if not (w[0] == "merge" and Path(w[-1]).exists())])
    page = out / "report" / "index.html"
    say(f"\n[{time.monotonic() - start:3.0f} s] done")
    emit(
        {
            "report": page,
            "scores": out / "report" / "scores.csv",
            "seconds": round(time.monotonic() - start),
        },
        page,
        json,
    )


def commands(
    out: Path,
    base: str,
    steps: int,
    num_images: int,
    seeds: int,
    sampling_steps: int,
    cell_size: int,
    seed: int,
) -> Iterator[list[str]]:
    """Yield the command lines of the path, those that do not wait for each other together.

    Each is run before the next are asked for.
    """
    at = shlex.quote(str(out))
    train = (
        f"--max-train-steps {steps} --train-batch-size 64 --learning-rate 5e-4 --global-prob 0.5 --consistency 0"
        f" --ema-decay 0.9 --seed {seed}"
    )
    cells = f"--bins 10 --groups 12 --batch-size {cell_size}"
    yield [f"analyze {base} --data digits --ranges 4 {cells} --seed {seed} -o {at}/conflict"]
    ranges = f"--ranges {at}/conflict/partition.json"
    yield [
        f"finetune {base} --data digits {ranges} {train} -o {at}/experts",
        f"finetune {base} --data digits --ranges joint:4 {train} -o {at}/joint",
    ]
    experts = " ".join(
        f"{at}/experts/{span}" for span in _ranges(out / "conflict" / "partition.json")
    )
    yield [f"stats {experts} --data digits --statistics fisher --samples 64 --seed {seed}"]
    halfway = "--method task_arithmetic --weights 0.5 --save-dtype float32"
    yield [f"merge {base} {at}/joint/0000-1000 {halfway} -o {at}/merged/joint-0.5"]
    for name, method in MERGES.items():
        yield [f"merge {base} {experts} {method} --save-dtype float32 -o {at}/merged/{name}"]
    merged = [f"{at}/merged/{name}" for name in ("joint-0.5", *MERGES)]
    models = [f"joint={at}/joint/0000-1000", f"ensemble={at}/experts", *merged]
    images = f"--num-images {num_images} --seeds {','.join(map(str, range(seeds)))} --steps {sampling_steps}"
    score = f"--data digits --features digits-cnn {images} --eval-batch-size 250 {ranges} -o {at}"
    halves = f"base={base} {' '.join(models[::2])}", f"--base {base} {' '.join(models[1::2])}"
    yield [f"evaluate {half} {score}" for half in halves]
    yield [f"compare {at} --title 'Handwritten digits: one base, four experts, their merges'"]


def _ranges(partition: Path) -> list[str]:
    from demerge.timesteps import Partition

    return [str(span) for span in Partition.load(partition)]


def run(together: list[list[str]]) -> None:
    """Run commands of this program, their results kept from stdout: one in this process, several side by side.

    Raises:
        DemergeError: what the one command raises.
    """
    from demerge.cli.main import app

    if len(together) > 1 and cores() > 1:
        with ThreadPoolExecutor(len(together)) as pool:
            codes = list(
                pool.map(lambda words: _beside(words, max(1, cores() // len(together))), together)
            )
    else:
        with redirect_stdout(sys.stderr):
            codes = [app(words, standalone_mode=False) for words in together]
    if code := next((code for code in codes if isinstance(code, int) and code), 0):
        raise typer.Exit(code)


def _beside(words: list[str], threads: int) -> int:
    """Run a command in a process of its own and pass on what it says; return its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    program = [sys.executable, "-m", "demerge.cli.main", *words]
    with subprocess.Popen(
        program,
        env=environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip())
    return process.returncode
