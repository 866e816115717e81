"""Images into a folder: 000000.png and so on, each written whole, continued by index.

`sample.json` says what the images are of; it is written first. The same call again draws the images that are missing. Whole
batches are drawn again, so that an interrupted folder ends in the bytes of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from demerge.diffusion.model import Diffusion
from demerge.diffusion.sampling import batches
from demerge.provenance import check_same_settings
from demerge.reporting.images import png
from demerge.storage.atomic import check_is_new, commit_bytes, commit_json, place_for
from demerge.storage.schema import Record, Table, read_record

SAMPLE = "sample.json"


class SampleRecord(Record):
    """What the images of a folder are of: `inputs` and `options` must be equal to continue it."""

    format: Literal["demerge.sample/1"] = "demerge.sample/1"
    inputs: Table = Field(default_factory=dict)
    options: Table = Field(default_factory=dict)


def sample_to(
    folder: Path | str,
    model: Diffusion,
    n: int,
    *,
    seed: int,
    steps: int = 50,
    sampler: str = "ddim",
    guidance_scale: float = 1.0,
    batch_size: int = 64,
    captions: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Draw images 0 .. n - 1 into a folder and return how many of them were missing; for the rest see `sample`.

    Raises:
        UsageError: if the folder cannot exist or holds something else, or images of other options or of another model.
    """
    folder = place_for(folder)
    drawn = batches(
        model,
        n,
        seed=seed,
        steps=steps,
        sampler=sampler,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        captions=captions,
        labels=labels,
    )
    options = {
        "num_images": n,
        "seed": seed,
        "steps": steps,
        "sampler": sampler,
        "guidance_scale": float(guidance_scale),
        "batch_size": batch_size,
        "device": model.device.type,
    }
    inputs = {
        "model": model.fingerprint,
        "ranges": str(getattr(model.denoiser, "partition", "")),
        "captions": hashlib.sha256("\0".join(captions or ()).encode()).hexdigest()
        if captions
        else "",
        "labels": ",".join(map(str, labels or ())),
    }
    _begin(folder, options, inputs)
    missing = {i for i in range(n) if not _place(folder, i).is_file()}
    for indices, draw in drawn:
        wanted = missing.intersection(indices)
        if wanted:
            for i, image in zip(indices, draw(), strict=True):
                if i in wanted:
                    commit_bytes(_place(folder, i), png(image))
        if progress is not None:
            progress(indices[-1] + 1, n)
    return len(missing)


def _begin(folder: Path, options: dict[str, Any], inputs: dict[str, Any]) -> None:
    place = folder / SAMPLE
    if place.is_file():
        record = read_record(place, SampleRecord, fix=f"draw into another folder than {folder}")
        check_same_settings(folder, record.model_dump(), options, inputs)
        return
    stray = f".{SAMPLE}."
    if not folder.is_dir() or not all(entry.name.startswith(stray) for entry in folder.iterdir()):
        check_is_new(folder)
    commit_json(place, SampleRecord(inputs=inputs, options=options).model_dump())


def _place(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"
