"""What a training step costs next to a bare loop of the same model, batch and dtype.

    OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/finetune.py --models digits small
    .venv/bin/python tests/benchmarks/finetune.py --device cuda --models cifar10 --batch-size 128 --mixed-precision bf16

The bare loop is what a careful script does: forward, forward of the teacher without gradient, backward, clip, fused AdamW,
moving average, images from a tensor on the device, torch.randn. It never reads the loss. Rows: `bare`, `ours` (without the
projection, so that both do the same arithmetic), `foldable` (with it), and on a GPU `graph`, the step as one CUDA graph.
`lora-bare` is the bare loop on peft's own LoRA of rank 16, with the frozen weights in the dtype of the run; `lora` is ours,
and is compared with it. All rows take their steps in turns. `ratio` is the median over the turns of a row's seconds over those of the bare loop in the
same turn (of `lora-bare` for `lora`); `cpu` the same of CPU seconds, which other work on the machine disturbs less; `images` is images per second;
`memory` the peak on the GPU in MB. `--json` prints one document; its `overhead_ratio` is that of `ours` on the last model,
`graph_speedup` the images per second of `graph` over those of `bare`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from turns import CLOCK, CPU, MODELS, load, median, ratio, show, take_turns

from demerge.data import ImageData
from demerge.data.values import as_floats
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import DTYPES
from demerge.finetuning.lora import freeze_base
from demerge.finetuning.options import FinetuneOptions
from demerge.finetuning.trainer import ExpertTraining, Job
from demerge.timesteps import TimestepRange

Turn = Callable[[int], None]
BARE = ("bare", "lora-bare")


def bare(base: Diffusion, data: ImageData, o: FinetuneOptions) -> Turn:
    """Return a function that takes n steps of the loop without demerge's trainer."""
    device, dtype = base.device, DTYPES[o.mixed_precision]
    student, teacher = copy.deepcopy(base.denoiser).train().requires_grad_(True), base.denoiser
    if o.lora_rank is not None:
        teacher = copy.deepcopy(base.denoiser)
        teacher = teacher if dtype is None else teacher.to(dtype)
        student = copy.deepcopy(teacher).train()
        targets = list(o.target_modules)
        config = LoraConfig(r=o.lora_rank, lora_alpha=o.lora_rank, target_modules=targets)
        inject_adapter_in_model(config, student)
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    images = as_floats(data.images(range(min(len(data), 4096)))).to(device)
    abar = base.alphas_cumprod.float().to(device)
    parameters = [p for p in student.parameters() if p.requires_grad]
    means = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=o.learning_rate, weight_decay=1e-6, fused=True)

    def steps(n: int) -> None:
        for _ in range(n):
            x0 = images[torch.randint(len(images), (o.train_batch_size,), device=device)]
            t = torch.randint(0, base.T, (o.train_batch_size,), device=device)
            noise, a = torch.randn_like(x0), abar[t].view(-1, 1, 1, 1)
            x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
            with nullcontext() if dtype is None else torch.autocast(device.type, dtype):
                prediction = student(x_t, t).sample
                with torch.no_grad():
                    goal = teacher(x_t, t).sample
                errors = (prediction.float() - noise).square() + (
                    prediction - goal
                ).float().square()
                loss = errors.mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(means, [p.detach() for p in parameters], 1e-4)

    return steps


def ours(base: Diffusion, data: ImageData, o: FinetuneOptions, folder: Path) -> Turn:
    """Return a function that takes n steps of demerge's trainer."""
    training = ExpertTraining(
        Job(freeze_base(base, o), data, o, {}), TimestepRange(0, base.T), folder
    )

    def steps(n: int) -> None:
        for _ in range(n):
            training.take_step()
            training.step += 1

    return steps


def compare(name: str, asked: argparse.Namespace) -> list[dict[str, object]]:
    """Return a line for the bare loop of a model and one for each way of ours."""
    base, data = load(name, asked.device)
    is_cuda = asked.device.startswith("cuda")
    plain = FinetuneOptions(
        max_train_steps=10**9,
        train_batch_size=asked.batch_size,
        mixed_precision=asked.mixed_precision,
        projection="none",
        cuda_graph="off",
        compile=asked.compile,
    )
    folder = Path(tempfile.mkdtemp())
    makers: dict[str, Callable[[], Turn]] = {
        "bare": lambda: bare(base, data, plain),
        "ours": lambda: ours(base, data, plain, folder / "ours"),
        "foldable": lambda: ours(base, data, replace(plain, projection="foldable"), folder / "f"),
    }
    lora = replace(plain, lora_rank=16)
    makers["lora-bare"] = lambda: bare(base, data, lora)
    makers["lora"] = lambda: ours(base, data, lora, folder / "l")
    if is_cuda:
        makers["graph"] = lambda: ours(base, data, replace(plain, cuda_graph="on"), folder / "g")
    turns, memory = {}, {}
    for row, make in makers.items():
        if row not in BARE and asked.rows and row not in asked.rows:
            continue
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        turns[row] = make()
        turns[row](asked.warm_up)
        memory[row] = torch.cuda.max_memory_allocated() / 1e6 if is_cuda else None
    work = {row: partial(turn, asked.steps) for row, turn in turns.items()}
    times, _ = take_turns(work, asked.repeat, asked.device)
    lines = []
    for row in turns:
        took = median(times, row, CLOCK)
        floor = "lora-bare" if row == "lora" else "bare"
        lines.append(
            {
                "model": name,
                "row": row,
                "ms": 1e3 * took / asked.steps,
                "images": asked.steps * asked.batch_size / took,
                "ratio": ratio(times, row, floor, CLOCK),
                "cpu": ratio(times, row, floor, CPU),
                "memory": memory[row],
            }
        )
    return lines


def main() -> None:
    """Compare the chosen models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["digits", "small"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=9, help="turns")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rows", nargs="+", help="these rows alone, next to the bare loop")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.device == "cpu":
        torch.set_num_threads(1)
    lines = [line for name in asked.models for line in compare(name, asked)]
    show(lines)
    if asked.json:
        ratios = {line["row"]: line["ratio"] for line in lines}
        document = {"overhead_ratio": ratios.get("ours"), "lines": lines}
        document["lora_ratio"] = ratios.get("lora")
        if "graph" in ratios:
            document["graph_speedup"] = 1 / float(str(ratios["graph"]))
        json.dump(document, sys.stdout)


if __name__ == "__main__":
    main()
