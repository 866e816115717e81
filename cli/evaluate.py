"""`demerge evaluate`: scores of models and image folders, with their protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from demerge.cli.common import Device, Json, emit, progress, say

METRICS, SAMPLING = "Metrics", "Sampling"


def _option(name: str, help: str, panel: str, **rules: Any) -> Any:
    return typer.Option(name, help=help, rich_help_panel=panel, **rules)


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Pipelines, folders of experts (routed), folders of images; NAME=MODEL names one."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data", help="Real images: folder, CIFAR-10 batches, idx, npz, digits, hf:NAME."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder; scores go to OUT/scores.")],
    base: Annotated[
        str | None, typer.Option(help="The base model; else the first stock pipeline among MODELS.")
    ] = None,
    split: Annotated[
        str, _option("--split", "Reference split: test, train or all.", METRICS)
    ] = "test",
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.")
    ] = False,
    features: Annotated[
        str,
        _option(
            "--features",
            "digits-cnn, random, inception:FILE (pytorch-fid's .pth, or safetensors); auto takes one of the first two.",
            METRICS,
        ),
    ] = "auto",
    preprocess: Annotated[
        str,
        _option(
            "--preprocess", "Inception's resize: clean, pytorch-fid or torch-fidelity.", METRICS
        ),
    ] = "clean",
    precision: Annotated[
        str, _option("--precision", "Inception in float32 (no) or bf16.", METRICS)
    ] = "no",
    reference: Annotated[
        Path | None,
        _option(
            "--reference",
            "Statistics of real images (.npz of pytorch-fid, EDM or ADM) in place of --data's.",
            METRICS,
        ),
    ] = None,
    reference_images: Annotated[
        int | None,
        _option(
            "--reference-images",
            "Take so many real images, default all; or how many --reference stands for.",
            METRICS,
            min=2,
        ),
    ] = None,
    ranges: Annotated[
        str,
        _option(
            "--ranges", "Ranges of the validation loss: uniform:N, a partition.json, none.", METRICS
        ),
    ] = "uniform:4",
    loss_samples: Annotated[
        int, _option("--loss-samples", "Draws per range.", METRICS, min=16)
    ] = 512,
    lpips: Annotated[
        bool, _option("--lpips/--no-lpips", "LPIPS drift and diversity.", METRICS)
    ] = True,
    num_images: Annotated[
        int, _option("--num-images", "Images per model and seed.", SAMPLING, min=2)
    ] = 2000,
    seeds: Annotated[str, _option("--seeds", "Sampling seeds.", SAMPLING)] = "0,1,2",
    steps: Annotated[int, _option("--steps", "Sampling steps.", SAMPLING, min=1)] = 50,
    sampler: Annotated[
        str, _option("--sampler", "ddim, or base for the base's own.", SAMPLING)
    ] = "ddim",
    guidance_scale: Annotated[
        float,
        _option(
            "--guidance-scale",
            "Classifier-free guidance of text-to-image models; 1 is none.",
            SAMPLING,
            min=1,
        ),
    ] = 1.0,
    eval_batch_size: Annotated[
        int, _option("--eval-batch-size", "Images per forward pass.", SAMPLING, min=1)
    ] = 64,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Score models against real images; the same command again goes on where it stopped."""
    from demerge.device import resolve_device
    from demerge.evaluation.planning import EvaluationOptions, parse_seeds, prepare
    from demerge.evaluation.report.tables import lines
    from demerge.evaluation.scores import tables_of

    options = EvaluationOptions(
        data,
        split=split,
        skip_broken=skip_broken,
        features=features,
        preprocess=preprocess,  # type: ignore[arg-type]
        precision=precision,
        num_images=num_images,
        reference=reference,
        reference_images=reference_images,
        seeds=parse_seeds(seeds),
        steps=steps,
        sampler=sampler,
        guidance_scale=guidance_scale,
        ranges=ranges,
        loss_samples=loss_samples,
        lpips=lpips,
        batch_size=eval_batch_size,
        device=resolve_device(device),
    )
    with progress(1, "evaluate") as bar:
        prepared = prepare(models, options, out, base=base, progress=bar)
        for folder in prepared.left_out:
            say(f"note: {folder} holds plots that demerge wrote, not a model; it was left out")
        scores = list(prepared.run())
    for line in lines(tables_of(scores)):
        say(line)
    emit(
        {"out": str(out / "scores"), "scores": [score.document() for score in scores]},
        out / "scores",
        json,
    )
