"""`demerge demo`: the whole path on the embedded default, by running the very commands a user would.

The base (a UNet of 0.2 M parameters trained on scikit-learn's digits) ships in the package; nothing is downloaded. The commands
are printed as they run, and again in the report, and can be copied.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Json, Seed, emit, say

MERGES = {
    "average": "--method average",
    "task-arithmetic": "--method task_arithmetic --weights 0.5,0.5,0.5,0.5",
    "ties": "--method ties --option density=0.5",
    "dare": "--method dare --option density=0.5",
    "fisher": "--method fisher",
}


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run.")] = Path("runs/demo"),
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Training steps per expert; the joint control gets 4 times as many.")
    ] = 150,
    num_images: Annotated[int, typer.Option("--num-images", min=65, help="Images per model and seed.")] = 500,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of sampling seeds.")] = 3,
    sampling_steps: Annotated[int, typer.Option("--sampling-steps", min=1, help="DDIM steps.")] = 20,
    cell_size: Annotated[int, typer.Option("--cell-size", min=1, help="Images per cell of the conflict map.")] = 128,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Walk the whole path offline, in some three minutes: conflict map, ranges, experts, merges, an honest report."""
    start = time.monotonic()
    say("demerge demo: one diffusion model of handwritten digits becomes four experts and merged models")
    from demerge.files import commit_json

    ran: list[str] = []
    for command in commands(out, steps, num_images, seeds, sampling_steps, cell_size, seed):
        ran.append(f"demerge {command}")
        say(f"\n[{time.monotonic() - start:3.0f} s] $ {ran[-1]}")
        arguments = shlex.split(command)
        if arguments[0] == "compare":
            commit_json(out / "commands.json", {"commands": ran})
        if not (arguments[0] == "merge" and Path(arguments[-1]).exists()):
            run(arguments)
    page = out / "report" / "index.html"
    say(f"\n[{time.monotonic() - start:3.0f} s] done")
    emit(
        {"report": page, "scores": out / "report" / "scores.csv", "seconds": round(time.monotonic() - start)},
        page,
        json,
    )


def commands(
    out: Path, steps: int, num_images: int, seeds: int, sampling_steps: int, cell_size: int, seed: int
) -> Iterator[str]:
    """Yield the command lines of the path one after the other; each is run before the next is asked for."""
    at = shlex.quote(str(out))
    train = f"--max-train-steps {steps} --train-batch-size 32 --learning-rate 2e-4 --ema-decay 0.99 --seed {seed}"
    cells = f"--bins 10 --groups 12 --train-batch-size {cell_size}"
    yield f"analyze digits-base --data digits -n 4 {cells} --seed {seed} -o {at}/conflict"
    ranges = f"--ranges {at}/conflict/partition.json"
    yield f"finetune digits-base --data digits {ranges} {train} -o {at}/experts"
    yield f"finetune digits-base --data digits --ranges joint:4 {train} -o {at}/joint"
    halfway = "--method task_arithmetic --weights 0.5 --save-dtype float32"
    yield f"merge digits-base {at}/joint/0000-1000 {halfway} -o {at}/merged/joint-0.5"
    experts = " ".join(f"{at}/experts/{span}" for span in _ranges(out / "conflict" / "partition.json"))
    yield f"stats {experts} --data digits --what fisher --samples 64 --seed {seed}"
    for name, method in MERGES.items():
        yield f"merge digits-base {experts} {method} --save-dtype float32 -o {at}/merged/{name}"
    merged = " ".join(f"{at}/merged/{name}" for name in ("joint-0.5", *MERGES))
    models = f"base=digits-base joint={at}/joint/0000-1000 {merged} ensemble={at}/experts"
    images = f"--num-images {num_images} --seeds {','.join(map(str, range(seeds)))} --steps {sampling_steps}"
    yield f"evaluate {models} --data digits --features digits-cnn {images} --eval-batch-size 250 {ranges} -o {at}"
    yield f"compare {at} --title 'Handwritten digits: one base, four experts, their merges'"


def _ranges(partition: Path) -> list[str]:
    from demerge.timesteps import Partition

    return [str(span) for span in Partition.load(partition)]


def run(arguments: list[str]) -> None:
    """Run a command of this program in this process, its result kept from stdout.

    Raises:
        DemergeError: what the command raises.
    """
    from demerge.cli.main import app

    with redirect_stdout(sys.stderr):
        code = app(arguments, standalone_mode=False)
    if isinstance(code, int) and code:
        raise typer.Exit(code)
