"""Images into a folder: 000000.png and so on, each written whole, continued by index.

`sample.json` says what the images are of, and is written first. The same call again draws the
missing images. Whole batches are drawn again, so that an interrupted folder ends in the bytes of an
uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from demerge.device import resolve_device
from demerge.diffusion.ensemble import load_routed
from demerge.diffusion.model import Diffusion
from demerge.diffusion.options import SampleInputs, SampleOptions
from demerge.diffusion.sampling import ImageSampler
from demerge.errors import InputError, UsageError
from demerge.progress import Progress, silent
from demerge.provenance import check_same_settings
from demerge.reporting.images import png
from demerge.stage import Cost
from demerge.storage.atomic import check_is_new, commit_bytes, commit_json, place_for
from demerge.storage.schema import Record, Table, read_record

SAMPLE = "sample.json"


class SampleRecord(Record):
    """What the images of a folder are of: `inputs` and `options` must be equal to continue it."""

    format: Literal["demerge.sample/1"] = "demerge.sample/1"
    inputs: Table = Field(default_factory=dict)
    options: Table = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DrawnImages:
    """A folder of images, of which `drawn` are new."""

    out: Path
    options: SampleOptions
    drawn: int

    def lines(self) -> list[str]:
        """Return how many images existed before."""
        total = self.options.num_images
        if self.drawn == total:
            return [f"{total:,} images drawn"]
        rest = f"{self.drawn:,} drawn now" if self.drawn else "nothing is left to do"
        return [f"{total - self.drawn:,} of {total:,} images existed already; {rest}"]

    def document(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        images = {"out": str(self.out), "images": self.options.num_images, "drawn": self.drawn}
        names = ("seed", "steps", "sampler", "guidance_scale", "mixed_precision")
        return images | {name: getattr(self.options, name) for name in names}


@dataclass(frozen=True, slots=True, eq=False)
class SamplePlan:
    """A loaded model that will draw images into a folder."""

    out: Path
    sampler: ImageSampler
    options: SampleOptions

    def describe(self) -> list[str]:
        """Return what will be drawn."""
        options = self.options
        images = f"{options.num_images:,} images of {self.sampler.model.folder}"
        how = f"{options.sampler}, {options.steps} steps, seed {options.seed}"
        how += "" if options.mixed_precision == "no" else f", {options.mixed_precision}"
        return [f"{images} ({how}) to {self.out}"]

    def cost(self) -> Cost:
        """Return the number of images."""
        return Cost(steps=self.options.num_images)

    def run(self, progress: Progress = silent) -> DrawnImages:
        """Draw the missing images.

        Raises:
            UsageError: if the folder holds something else, or images of other options or models.
            NumericalError: if an image is not finite.
        """
        n, batch_size = self.options.num_images, self.options.batch_size
        self._begin()
        missing = {i for i in range(n) if not self._path(i).is_file()}
        for start in range(0, n, batch_size):
            indices = range(start, min(start + batch_size, n))
            if missing.intersection(indices):
                images = self.sampler.draw(indices).cpu()
                for i, image in zip(indices, images, strict=True):
                    if i in missing:
                        commit_bytes(self._path(i), png(image))
            progress(indices.stop, n)
        return DrawnImages(self.out, self.options, len(missing))

    def _begin(self) -> None:
        """Write `sample.json`, or check that it says the same."""
        path, record = self.out / SAMPLE, self._record()
        if path.is_file():
            fix = f"draw into another folder than {self.out}"
            recorded = read_record(path, SampleRecord, fix=fix)
            before = recorded.model_dump()
            before["options"] = {"mixed_precision": "no", **recorded.options}
            check_same_settings(self.out, before, record.options, record.inputs)
            return
        files = self.out.iterdir() if self.out.is_dir() else [path]
        if any(not file.name.startswith(f".{SAMPLE}.") for file in files):
            check_is_new(self.out)
        commit_json(path, record.model_dump())

    def _record(self) -> SampleRecord:
        model, options, captions = self.sampler.model, self.options, self.sampler.captions
        digest = hashlib.sha256("\0".join(captions or ()).encode()).hexdigest()
        inputs: Table = {
            "model": model.fingerprint,
            "ranges": str(getattr(model.denoiser, "partition", "")),
            "captions": digest if captions else "",
            "labels": ",".join(map(str, options.labels or ())),
        }
        names = ["num_images", "seed", "steps", "sampler", "guidance_scale", "batch_size"]
        names.append("mixed_precision")
        settings: Table = {name: getattr(options, name) for name in names}
        settings["guidance_scale"] = float(options.guidance_scale)
        return SampleRecord(inputs=inputs, options=settings | {"device": model.device.type})

    def _path(self, index: int) -> Path:
        return self.out / f"{index:06d}.png"


def plan(inputs: SampleInputs, options: SampleOptions) -> SamplePlan:
    """Load the model of `demerge sample`, or its experts.

    Raises:
        UsageError: if an option does not suit the model or the folder cannot exist.
        InputError: if a model or the captions cannot be read.
    """
    device = resolve_device(inputs.device)
    captions = None if inputs.captions is None else read_captions(inputs.captions)
    if inputs.experts is None:
        model = Diffusion.load(inputs.model, device=device, resolution=inputs.resolution)
    else:
        model = load_routed(
            inputs.model, inputs.experts, device=device, resolution=inputs.resolution
        )
    return plan_images(inputs.out, model, options, captions)


def plan_images(
    out: str | Path, model: Diffusion, options: SampleOptions, captions: Sequence[str] | None = None
) -> SamplePlan:
    """Return the plan to draw images of a loaded model into a folder; see `sample`.

    Raises:
        UsageError: if an option does not suit the model or the folder cannot exist.
    """
    sampler = ImageSampler(model, options, options.seed, captions, options.labels)
    return SamplePlan(place_for(out), sampler, options)


def read_captions(file: str | Path) -> list[str]:
    """Read captions, one per line.

    Raises:
        UsageError: if there is no such file.
        InputError: if the file cannot be read as UTF-8.
    """
    if not Path(file).is_file():
        fix = "give the path of a text file to --captions"
        raise UsageError(f"{file}: there is no such file of captions", fix=fix)
    try:
        return Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fix = "save it as UTF-8, one caption per line"
        raise InputError(f"{file}: cannot be read as UTF-8: {error}", fix=fix) from error
