"""`demerge sample`: images from a model, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demerge.cli.common import Device, Json, Seed, device_of, emit, progress


def sample(
    model: Annotated[str, typer.Argument(help="Pipeline folder or Hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder that gets 000000.png and so on.")],
    num_images: Annotated[int, typer.Option("-n", "--num-images", min=1, help="How many images.")] = 16,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Sampling steps.")] = 50,
    sampler: Annotated[str, typer.Option(help="ddim, or base for the base's own scheduler.")] = "ddim",
    experts: Annotated[
        Path | None, typer.Option(help="Folder of experts: sample the routed ensemble on MODEL's schedule.")
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Text file, a caption per line, for text-to-image models.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Classes for class-conditional models, for example 3,3,7; one after the other by default."),
    ] = None,
    eval_batch_size: Annotated[int, typer.Option("--eval-batch-size", min=1, help="Images per forward pass.")] = 64,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Draw images; image i depends on the seed and i alone."""
    from demerge.diffusion import Diffusion
    from demerge.files import refuse_existing
    from demerge.images import write_pngs
    from demerge.sample import labels_of, load_routed
    from demerge.sample import sample as draw

    refuse_existing(out)
    place = device_of(device)
    base = load_routed(model, experts, device=place) if experts else Diffusion.load(model, device=place)
    texts = captions.read_text(encoding="utf-8").splitlines() if captions else None
    with progress(num_images, "sample") as bar:
        images = draw(
            base,
            num_images,
            seed=seed,
            steps=steps,
            sampler=sampler,
            batch_size=eval_batch_size,
            captions=texts,
            labels=None if labels is None else labels_of(labels),
            progress=bar,
        )
    write_pngs(out, images)
    emit({"out": out, "images": num_images, "seed": seed, "steps": steps, "sampler": sampler}, out, json)
