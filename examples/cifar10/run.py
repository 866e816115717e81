#!/usr/bin/env python3
"""A base through the whole path by commands of demerge: map, experts, control, merges, scores.

    examples/cifar10/run.py --base cifar10-base --data cifar-10-batches-bin --minutes 60
    examples/cifar10/run.py --smoke

Run it again to continue. README.md says what it does and how to read the result.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from demerge.cli.main import main as demerge
from demerge.device import resolve_device

HERE = Path(__file__).resolve().parent
ASSETS = Path(os.environ.get("DEMERGE_ASSETS") or HERE.parents[2] / "shared" / "assets")
FILES = {  # what is looked for in the folder of assets
    "base": "cifar10-base",
    "data": "cifar10",
    "reference": "cifar10-base/cifar10-train-inception.safetensors",
    "inception": "inception/pt_inception-2015-12-05.nofc.safetensors",
}
EXPERTS = 4
MERGES = {
    "average": "--method average",
    "task-arithmetic": "--method task_arithmetic --weights 0.5,0.5,0.5,0.5",
    "ties": "--method ties --option density=0.5",
    "dare": "--method dare --option density=0.5",
    "fisher": "--method fisher",
}
MODELS = 3 + len(MERGES)  # base, joint control and ensemble too
BINS = 10
# shares of the time; the rest is for starting, merging and the report
ANALYSIS, TRAINING, SCORING = 0.1, 0.4, 0.4


@dataclass(frozen=True)
class Size:
    """How much of everything is done. `steps` are those of an expert."""

    batch: int
    steps: int
    groups: str
    images: int
    seeds: int
    sampling_steps: int
    loss_samples: int = 512
    fisher_samples: int = 256
    bins: int = BINS


SMOKE = Size(4, 2, "--groups 5", 8, 1, 2, loss_samples=16, fisher_samples=8, bins=4)


# -- how large -------------------------------------------------------------------------------------


def seconds(*words: str) -> float:
    """Return the seconds of a command."""
    start = time.perf_counter()
    run(list(words))
    return time.perf_counter() - start


def seconds_each(command: list[str], count: str, few: int, many: int, folder: Path) -> float:
    """Return the seconds of one step or image: from two runs, so that the start cancels."""
    took = [
        seconds(*command, count, str(n), "-o", str(folder / f"{command[0]}-{n}"))
        for n in (few, many)
    ]
    return max(took[1] - took[0], 0.1 * took[1]) / (many - few)


def choose_size(asked: argparse.Namespace) -> Size:
    """Measure a training step and the drawing of an image; return what fits the minutes."""
    start, folder, batch = time.perf_counter(), asked.out / "timing", asked.batch_size
    shutil.rmtree(folder, ignore_errors=True)
    is_cpu = asked.device == "cpu"
    train = ["finetune", asked.base, "--data", asked.data, "--ranges", "joint"]
    train += training_options(asked, batch)
    step = seconds_each(train, "--max-train-steps", 1, 4 if is_cpu else 50, folder)
    draw = ["sample", asked.base, "--steps", "5", "--batch-size", str(batch)]
    draw += ["--device", asked.device, "--mixed-precision", precision(asked)]
    image = seconds_each(draw, "--num-images", batch, 5 * batch, folder)
    shutil.rmtree(folder)
    left = 60 * asked.minutes - (time.perf_counter() - start)
    budget = ANALYSIS * left
    fits = 5 * BINS * 4 * step < budget  # a captured step takes a fraction of a pass
    total = SCORING * left / (MODELS * image * asked.sampling_steps / 5)
    seeds = min(3, max(1, int(total / asked.num_images)))
    size = Size(
        batch,
        steps=max(1, int(TRAINING * left / (2 * EXPERTS * step))),
        groups=f"--budget {budget:.0f}s" if fits else "--groups 5",
        images=max(64, min(asked.num_images, int(total / seeds))),
        seeds=seeds,
        sampling_steps=asked.sampling_steps,
    )
    print(f"{1e3 * step:.3g} ms per step of {batch} images; {size}", file=sys.stderr)
    return size


# -- the commands ----------------------------------------------------------------------------------


def training_options(asked: argparse.Namespace, batch: int) -> list[str]:
    """Return the options that experts and control share."""
    return shlex.split(
        f"--train-batch-size {batch} --learning-rate {asked.learning_rate} --lr-scheduler cosine"
        f" --global-prob 0.5 --consistency 0 --ema-decay 0.99 --random-flip"
        f" --mixed-precision {precision(asked)} --device {asked.device}"
    )


def precision(asked: argparse.Namespace) -> str:
    """Return the precision of training and of sampling: bfloat16 on a GPU."""
    return "no" if asked.device == "cpu" else "bf16"


def commands(asked: argparse.Namespace, size: Size) -> Iterator[str]:
    """Yield the command lines of the path."""
    at, base = shlex.quote(str(asked.out)), shlex.quote(asked.base)
    data, device = f"--data {shlex.quote(asked.data)}", f"--device {asked.device}"
    yield (
        f"analyze {base} {data} --ranges {EXPERTS} --bins {size.bins} {size.groups}"
        f" --batch-size {size.batch} {device} -o {at}/conflict"
    )
    ranges, train = f"--ranges {at}/conflict/partition.json", training_options(asked, size.batch)
    shared = f"{data} --max-train-steps {size.steps} {shlex.join(train)}"
    fisher = f"--fisher-samples {size.fisher_samples}"
    yield f"finetune {base} {shared} {ranges} {fisher} -o {at}/experts"
    yield f"finetune {base} {shared} --ranges joint:{EXPERTS} -o {at}/joint"
    for name, method in MERGES.items():
        yield f"merge {base} {at}/experts {method} --save-dtype float32 -o {at}/merged/{name}"
    models = f"base={base} joint={at}/joint ensemble={at}/experts"
    models += "".join(f" {at}/merged/{name}" for name in MERGES)
    images = f"--num-images {size.images} --seeds {','.join(map(str, range(size.seeds)))}"
    images += f" --steps {size.sampling_steps} --batch-size {size.batch}"
    images += f" --mixed-precision {precision(asked)}"
    losses = f"{ranges} --loss-samples {size.loss_samples}"
    yield f"evaluate {models} {data} {images} {losses} {features(asked)} {device} -o {at}"
    yield f"compare {at} --title 'One base, four experts, their merges'"


def features(asked: argparse.Namespace) -> str:
    """Return the options that make the distance an FID, if there are weights of Inception."""
    if not asked.inception:
        return ""
    options = f"--features inception:{shlex.quote(asked.inception)} --preprocess pytorch-fid"
    if asked.reference:
        options += f" --reference {shlex.quote(asked.reference)}"
        options += f" --reference-images {asked.reference_images}"
    return options


def unpack_reference(file: Path, out: Path) -> Path:
    """Write statistics `mu` [D] and `sigma_upper`, the upper triangle of sigma, as an npz."""
    import numpy as np
    from safetensors.numpy import load_file

    arrays = load_file(file)
    mu = arrays["mu"].astype(np.float64)
    upper = np.zeros((len(mu), len(mu)))
    upper[np.triu_indices(len(mu))] = arrays["sigma_upper"]
    np.savez(out, mu=mu, sigma=upper + upper.T - np.diag(np.diag(upper)))
    return out


# -- running them ----------------------------------------------------------------------------------


def run(words: list[str]) -> None:
    """Run a command of demerge in this process, so that torch is imported once."""
    print(f"$ demerge {shlex.join(words)}", file=sys.stderr, flush=True)
    sys.argv = ["demerge", *words]
    try:
        demerge()
    except SystemExit as ended:
        if ended.code:
            raise


def begin(asked: argparse.Namespace) -> list[str]:
    """Return the commands of the run: those that it began with, if there are any."""
    record = asked.out / "recipe.json"
    options = {name: str(value) for name, value in vars(asked).items()}
    if record.exists():
        begun = json.loads(record.read_text())
        names = [name for name in options if options[name] != begun["options"].get(name)]
        if names:
            changes = ", ".join(f"{n} was {begun['options'].get(n)}" for n in names)
            sys.exit(f"{asked.out} was begun with other options: {changes}\n  fix: another --out")
        return list(begun["commands"])
    asked.out.mkdir(parents=True, exist_ok=True)
    if str(asked.reference).endswith(".safetensors"):
        asked.reference = str(unpack_reference(Path(asked.reference), asked.out / "reference.npz"))
    lines = list(commands(asked, SMOKE if asked.smoke else choose_size(asked)))
    # the report of compare shows commands.json
    write_json(asked.out / "commands.json", {"commands": [f"demerge {line}" for line in lines]})
    write_json(record, {"options": options, "commands": lines})
    return lines


def write_json(path: Path, document: dict[str, object]) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=2), encoding="utf-8")
    temporary.replace(path)


def parse() -> argparse.Namespace:
    """Read the options; files that are not named are looked for in the folder of assets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10-recipe"))
    parser.add_argument("--minutes", type=float, default=60, help="time for all of it")
    parser.add_argument("--smoke", action="store_true", help="a tiny size; the scores mean nothing")
    parser.add_argument("--base", help="pipeline folder or Hub id")
    parser.add_argument("--data", help="images, as `demerge finetune --data` takes them")
    parser.add_argument("--inception", help="weights of Inception; else the distance is no FID")
    parser.add_argument("--reference", help="statistics of real images, .npz")
    parser.add_argument("--reference-images", type=int, default=50_000, help="their number")
    parser.add_argument("--num-images", type=int, default=10_000, help="the most, per seed")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, help="by default 128, on a CPU 16")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    asked.device = resolve_device(asked.device)
    asked.batch_size = asked.batch_size or (16 if asked.device == "cpu" else 128)
    if asked.base is None:  # files of the assets belong to their base
        for name, file in FILES.items():
            if getattr(asked, name) is None and (ASSETS / file).exists():
                setattr(asked, name, str(ASSETS / file))
    if asked.base is None or asked.data is None:
        parser.error("there is no base or no data: give --base and --data")
    return asked


def main() -> None:
    """Run all commands of the path that are not done."""
    asked = parse()
    start = time.perf_counter()
    for command in begin(asked):
        words = shlex.split(command)
        if words[0] != "merge" or not Path(words[-1]).exists():
            run(words)
    minutes = (time.perf_counter() - start) / 60
    print(f"{minutes:.1f} minutes; the report: {asked.out / 'report' / 'index.html'}")


if __name__ == "__main__":
    main()
