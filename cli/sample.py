"""`demerge sample`: images from a model, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Device, Json, Seed, emit, progress, say


def sample(
    model: Annotated[str, typer.Argument(help="Pipeline folder or Hub id.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder that gets 000000.png and so on.")
    ],
    num_images: Annotated[
        int, typer.Option("-n", "--num-images", min=1, help="How many images.")
    ] = 16,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Sampling steps.")] = 50,
    sampler: Annotated[
        str, typer.Option(help="ddim, or base for the base's own scheduler.")
    ] = "ddim",
    guidance_scale: Annotated[
        float,
        typer.Option(
            min=1,
            help="Classifier-free guidance of text-to-image models and DiT; 1 is none. Stock pipelines take 7.5 and 4.",
        ),
    ] = 1.0,
    experts: Annotated[
        Path | None,
        typer.Option(help="Folder of experts: sample the routed ensemble on MODEL's schedule."),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text file, a caption per line, for text-to-image models.",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Classes for class-conditional models, for example 3,3,7; one after the other by default."
        ),
    ] = None,
    eval_batch_size: Annotated[
        int, typer.Option("--eval-batch-size", min=1, help="Images per forward pass.")
    ] = 64,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Draw images; image i depends on the seed and i alone. The same command again draws those that are missing."""
    from demerge.device import resolve_device
    from demerge.diffusion.drawing import sample_to
    from demerge.diffusion.model import Diffusion
    from demerge.diffusion.sampling import captions_of, labels_of, load_routed

    place = resolve_device(device)
    base = (
        load_routed(model, experts, device=place)
        if experts
        else Diffusion.load(model, device=place)
    )
    texts = captions_of(captions) if captions else None
    with progress(num_images, "sample") as bar:
        drawn = sample_to(
            out,
            base,
            num_images,
            seed=seed,
            steps=steps,
            sampler=sampler,
            guidance_scale=guidance_scale,
            batch_size=eval_batch_size,
            captions=texts,
            labels=None if labels is None else labels_of(labels),
            progress=bar,
        )
    if drawn < num_images:
        say(
            f"{num_images - drawn:,} of {num_images:,} images were there already"
            + ("; nothing is left to do" * (not drawn))
        )
    result = {
        "out": out,
        "images": num_images,
        "drawn": drawn,
        "seed": seed,
        "steps": steps,
        "sampler": sampler,
    }
    emit(result | {"guidance_scale": guidance_scale}, out, json)
