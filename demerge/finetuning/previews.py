"""Previews of an expert: its images beside the base's, from the same noise.

    OUT/state/RANGE/preview-00000500.png    above the base's images, below the averaged expert's
    OUT/RANGE/preview.png                   the last one, of the finished expert

A preview works on a copy of the averages. Its noise is keyed by the seed and the number of the
image, as `demerge sample` draws it. So the training ends in the same bits with and without it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from demerge.diffusion.model import Diffusion
from demerge.diffusion.options import SamplingOptions
from demerge.diffusion.sampling import sample
from demerge.errors import DemergeError
from demerge.finetuning.trainer import ExpertTraining, Observer
from demerge.reporting.images import grid, png
from demerge.storage.atomic import commit_bytes

STEPS = 20  # of the sampler
SMALLEST = 64  # pixels that an image has in a strip, at least


class Previews(Observer):
    """Writes a strip of images every `preview_steps` steps and after the last one."""

    def __init__(self) -> None:
        self._of_base: Tensor | None = None

    def stepped(self, training: ExpertTraining) -> None:
        """Write a preview if one is due; say so if it cannot be drawn."""
        o, step = training.options, training.step
        if step % o.preview_steps != 0 and step != o.max_train_steps:
            return
        try:
            strip = self._draw(training)
        except (DemergeError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0]
            training.say(f"no preview at step {step} of {training.range}: {reason}")
            return
        commit_bytes(training.folder / f"preview-{step:08d}.png", strip)

    def finish(self, training: ExpertTraining, folder: Path) -> None:
        """Put the last preview beside the expert."""
        strips = sorted(training.folder.glob("preview-*.png"))
        if strips:
            shutil.copyfile(strips[-1], folder / "preview.png")

    def _draw(self, training: ExpertTraining) -> bytes:
        """Return two rows of images as PNG."""
        base, count = training.base, training.options.num_previews
        if self._of_base is None:
            self._of_base = _images(base, training)
        own = _images(base.with_denoiser(training.averaged_denoiser()), training)
        scale = max(1, SMALLEST // own.shape[-2])
        return png(grid(torch.cat([self._of_base, own]), count), scale=scale)


def _images(model: Diffusion, training: ExpertTraining) -> Tensor:
    """Draw the images of a preview, uint8 [B C H W]."""
    o, captions = training.options, training.job.data.captions
    precision = "no" if o.lora_rank is None else o.mixed_precision  # that of the frozen weights
    count = o.num_previews
    return sample(
        model,
        count,
        SamplingOptions(steps=min(STEPS, model.T), batch_size=count, mixed_precision=precision),
        seed=o.seed,
        captions=captions[:count] if captions and model.requires_text else None,
    )
