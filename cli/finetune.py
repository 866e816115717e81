"""`demerge finetune`: one expert per range, or the joint control, or a base from a random start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from demerge.cli.common import Device, Json, Seed, device_of, emit, progress, say, stop_signals

TRAINING, OBJECTIVE, DATA = "Training", "Objective", "Data"


def _option(name: str, help: str, panel: str, **rules: Any) -> Any:
    return typer.Option(name, help=help, rich_help_panel=panel, **rules)


def finetune(
    model: Annotated[
        str,
        typer.Argument(help="Pipeline folder or Hub id; with --init random a model config (JSON)."),
    ],
    data: Annotated[
        str, _option("--data", "Image folder, CIFAR-10 batches, idx, npz, digits or hf:NAME.", DATA)
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder that gets one expert folder per range.")
    ],
    ranges: Annotated[
        str | None,
        typer.Option(
            help="uniform:N, joint, joint:K (K times the steps) or a partition.json; uniform:4 where none is given."
        ),
    ] = None,
    split: Annotated[str, _option("--split", "train, test or all.", DATA)] = "train",
    skip_broken: Annotated[
        bool, _option("--skip-broken", "Leave out images that cannot be read.", DATA)
    ] = False,
    random_flip: Annotated[
        bool, _option("--random-flip", "Mirror half of the images.", DATA)
    ] = False,
    caption_dropout: Annotated[
        float,
        _option(
            "--caption-dropout", 'Share of captions replaced by "", for text-to-image bases.', DATA
        ),
    ] = 0.1,
    init: Annotated[
        str, typer.Option(help="pretrained, or random to train a base.")
    ] = "pretrained",
    train_layers: Annotated[
        Path | None,
        _option(
            "--train-layers",
            "layers.json of `demerge layers`: what is trained; the rest stays.",
            TRAINING,
        ),
    ] = None,
    max_train_steps: Annotated[
        int, _option("--max-train-steps", "Optimizer steps per expert.", TRAINING)
    ] = 1000,
    train_batch_size: Annotated[
        int, _option("--train-batch-size", "Images per step.", TRAINING)
    ] = 64,
    gradient_accumulation_steps: Annotated[
        int, _option("--gradient-accumulation-steps", "Batches per optimizer step.", TRAINING)
    ] = 1,
    learning_rate: Annotated[
        float, _option("--learning-rate", "Peak learning rate.", TRAINING)
    ] = 5e-5,
    lr_scheduler: Annotated[
        str, _option("--lr-scheduler", "constant, linear or cosine.", TRAINING)
    ] = "constant",
    lr_warmup_steps: Annotated[
        int, _option("--lr-warmup-steps", "Steps of linear warm-up.", TRAINING)
    ] = 0,
    adam_beta1: Annotated[float, _option("--adam-beta1", "AdamW beta 1.", TRAINING)] = 0.95,
    adam_beta2: Annotated[float, _option("--adam-beta2", "AdamW beta 2.", TRAINING)] = 0.999,
    adam_weight_decay: Annotated[
        float, _option("--adam-weight-decay", "AdamW weight decay.", TRAINING)
    ] = 1e-6,
    max_grad_norm: Annotated[
        float, _option("--max-grad-norm", "Gradient clipping.", TRAINING)
    ] = 1.0,
    mixed_precision: Annotated[str, _option("--mixed-precision", "no or bf16.", TRAINING)] = "no",
    save_dtype: Annotated[
        str,
        _option(
            "--save-dtype", "dtype of the experts on disk: float32, float16 or bfloat16.", TRAINING
        ),
    ] = "float32",
    use_ema: Annotated[
        bool, _option("--use-ema/--no-use-ema", "Keep the average of the weights.", TRAINING)
    ] = True,
    ema_decay: Annotated[
        float, _option("--ema-decay", "Decay of the average, at most.", TRAINING)
    ] = 0.9999,
    fisher_samples: Annotated[
        int,
        _option(
            "--fisher-samples",
            "Images for the range's Fisher, which `merge --method fisher` takes.",
            TRAINING,
        ),
    ] = 0,
    checkpointing_steps: Annotated[
        int, _option("--checkpointing-steps", "Steps between checkpoints.", TRAINING)
    ] = 500,
    logging_steps: Annotated[
        int, _option("--logging-steps", "Steps between lines of log.jsonl.", TRAINING)
    ] = 50,
    p: Annotated[
        float, _option("--p", "Share of timesteps drawn from all of [0, T).", OBJECTIVE)
    ] = 0.3,
    sampling: Annotated[
        str,
        _option("--sampling", "mixture, or paper for its batch-wise antithetic draw.", OBJECTIVE),
    ] = "mixture",
    consistency: Annotated[
        float, _option("--consistency", "lambda, the pull to the base's prediction.", OBJECTIVE)
    ] = 1.0,
    consistency_schedule: Annotated[
        str,
        _option("--consistency-schedule", "constant, linear or cosine decay of lambda.", OBJECTIVE),
    ] = "constant",
    loss_weight: Annotated[
        str, _option("--loss-weight", "one, min-snr, truncated-snr, snr+1 or p2.", OBJECTIVE)
    ] = "one",
    snr_gamma: Annotated[float, _option("--snr-gamma", "gamma of min-snr.", OBJECTIVE)] = 5.0,
    projection: Annotated[
        str, _option("--projection", "foldable or none.", OBJECTIVE)
    ] = "foldable",
    seed: Seed = 0,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json: Json = False,
) -> None:
    """Finetune one expert per range of timesteps; the same command again resumes.

    Each expert is a stock pipeline folder OUT/0000-0250 with expert.json and log.jsonl.
    """
    from dataclasses import fields

    from demerge.finetuning import FinetuneOptions
    from demerge.finetuning import finetune as train
    from demerge.finetuning.planning import prepare
    from demerge.finetuning.train import check

    given = locals()
    options = FinetuneOptions(
        **{f.name: given[f.name] for f in fields(FinetuneOptions) if f.name in given}
    )
    place = device_of(device)
    plan = prepare(
        model,
        data,
        ranges,
        options,
        out,
        split=split,
        init=init,
        device=place,
        skip_broken=skip_broken,
        train_layers=train_layers,
    )
    for line in plan.lines():
        say(line)
    if dry_run:
        check(plan.base, plan.data, plan.ranges, plan.options, out, layers=plan.layers)
        emit(plan.document(), None, json)
        return
    with stop_signals() as stop, progress(plan.total_steps, "finetune") as bar:
        done = plan.finished_steps
        for step in train(
            plan.base, plan.data, plan.ranges, plan.options, out, layers=plan.layers, stop=stop
        ):
            bar(done + step.step, plan.total_steps, f"{step.range} loss {step.loss:.4f}")
            done += step.total if step.step == step.total else 0
    emit(plan.document(), out, json)
