"""`demerge demo`: the whole path on embedded models, by the commands that a user would run.

The base is a UNet of 0.2 M parameters, trained for 400 steps on scikit-learn's digits. It ships in
the package, next to a converged one; nothing is downloaded. The commands are printed as they run
and again in the report, and can be copied. Commands that do not wait for each other run in parallel
if the machine has the cores.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import typer

from demerge.cli.common import Json, emit, say
from demerge.cli.options import from_options
from demerge.device import count_cores
from demerge.evaluation.options import EvaluationOptions
from demerge.options import Options, SeedOptions, again, option

MERGES = {
    "average": "--method average",
    "task-arithmetic": "--method task_arithmetic --weights 0.5,0.5,0.5,0.5",
    "ties": "--method ties --option density=0.5",
    "dare": "--method dare --option density=0.5",
    "fisher": "--method fisher",
}


@dataclass(frozen=True, kw_only=True, repr=False)
class DemoOptions(Options):
    """The size of the demo."""

    out: Path = option(Path("runs/demo"), "Folder of the run.", flags=("-o", "--out"))
    base: Literal["digits-early", "digits-base"] = option(
        "digits-early", "The base: one whose timesteps conflict, or a converged one."
    )
    steps: int = option(150, "Steps per expert; the joint control gets 4 times as many.", ge=1)
    num_images: int = again(EvaluationOptions, "num_images", default=200, panel=None, ge=65)
    seeds: int = option(5, "Number of sampling seeds.", ge=1)
    sampling_steps: int = option(12, "DDIM steps.", ge=1)
    cell_size: int = option(96, "Images per cell of the conflict map.", ge=1)
    seed: int = again(SeedOptions, "seed")


@from_options
def demo(options: DemoOptions, *, context: typer.Context, json: Json = False) -> None:
    """Run the whole path offline in some three minutes, and write a report."""
    start, out = time.monotonic(), options.out
    say("demerge demo: a diffusion model of handwritten digits becomes four experts and merges")
    from demerge.storage.atomic import commit_json

    app: Any = context.find_root().command
    printed: list[str] = []
    for parallel in list_commands(options):
        for command in parallel:
            printed.append(f"demerge {command}")
            say(f"\n[{time.monotonic() - start:3.0f} s] $ {printed[-1]}")
        if parallel[0].startswith("compare"):
            commit_json(out / "commands.json", {"commands": printed})
        words = [shlex.split(command) for command in parallel]
        run(app, [w for w in words if not (w[0] == "merge" and Path(w[-1]).exists())])
    seconds = round(time.monotonic() - start)
    say(f"\n[{seconds:3.0f} s] done")
    page, scores = out / "report" / "index.html", out / "report" / "scores.csv"
    emit({"report": page, "scores": scores, "seconds": seconds}, page, json)


def list_commands(options: DemoOptions) -> Iterator[list[str]]:
    """Yield the command lines of the path; those that may run in parallel come together.

    Each must run before the next is taken.
    """
    from demerge.timesteps import Partition

    o, at, base = options, shlex.quote(str(options.out)), options.base
    train = (
        f"--max-train-steps {o.steps} --train-batch-size 64 --learning-rate 5e-4 "
        f"--global-prob 0.5 --consistency 0 --ema-decay 0.9 --seed {o.seed}"
    )
    cells = f"--bins 10 --groups 12 --batch-size {o.cell_size} --seed {o.seed}"
    yield [f"analyze {base} --data digits --ranges 4 {cells} -o {at}/conflict"]
    ranges = f"--ranges {at}/conflict/partition.json"
    yield [
        f"finetune {base} --data digits {ranges} {train} -o {at}/experts",
        f"finetune {base} --data digits --ranges joint:4 {train} -o {at}/joint",
    ]
    spans = Partition.load(o.out / "conflict" / "partition.json")
    experts = " ".join(f"{at}/experts/{span}" for span in spans)
    yield [f"stats {experts} --data digits --statistics fisher --samples 64 --seed {o.seed}"]
    halfway = "--method task_arithmetic --weights 0.5 --save-dtype float32"
    yield [f"merge {base} {at}/joint/0000-1000 {halfway} -o {at}/merged/joint-0.5"]
    for name, method in MERGES.items():
        yield [f"merge {base} {experts} {method} --save-dtype float32 -o {at}/merged/{name}"]
    merged = [f"{at}/merged/{name}" for name in ("joint-0.5", *MERGES)]
    models = [f"joint={at}/joint/0000-1000", f"ensemble={at}/experts", *merged]
    seeds = ",".join(map(str, range(o.seeds)))
    images = f"--num-images {o.num_images} --seeds {seeds} --steps {o.sampling_steps}"
    score = f"--data digits --features digits-cnn {images} --batch-size 250 {ranges} -o {at}"
    halves = f"base={base} {' '.join(models[::2])}", f"--base {base} {' '.join(models[1::2])}"
    yield [f"evaluate {half} {score}" for half in halves]
    yield [f"compare {at} --title 'Handwritten digits: one base, four experts, their merges'"]


def run(app: Callable[..., Any], commands: list[list[str]]) -> None:
    """Run commands of this program, with their stdout sent to stderr.

    One runs in this process, several run in processes of their own.

    Raises:
        DemergeError: that of a command in this process.
    """
    if len(commands) > 1 and count_cores() > 1:
        threads = max(1, count_cores() // len(commands))
        with ThreadPoolExecutor(len(commands)) as pool:
            codes = list(pool.map(partial(_run_process, threads=threads), commands))
    else:
        with redirect_stdout(sys.stderr):
            codes = [app(words, standalone_mode=False) for words in commands]
    for code in codes:
        if isinstance(code, int) and code:
            raise typer.Exit(code)


def _run_process(words: list[str], threads: int) -> int:
    """Run a command in a process of its own and print its output; return its exit code."""
    with subprocess.Popen(
        [sys.executable, "-m", "demerge.cli.main", *words],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        for line in process.stdout or ():
            say(line.rstrip())
    return process.returncode
