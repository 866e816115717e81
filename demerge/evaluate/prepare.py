"""From the words of a command to a contest: data, reference, feature net, judge, entrants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from demerge.data import ImageData, load_images
from demerge.diffusion import Diffusion
from demerge.errors import UsageError
from demerge.evaluate.contest import Contest
from demerge.evaluate.entrants import Entrant, entrants
from demerge.evaluate.features import Progress, feature_net
from demerge.evaluate.inception import Preprocess
from demerge.evaluate.judge import Judge
from demerge.evaluate.lpips import load_lpips
from demerge.evaluate.protocol import Scores
from demerge.evaluate.reference import Reference
from demerge.timesteps import Partition

OTHER = {"test": "train", "train": "test"}


@dataclass(frozen=True, slots=True)
class Words:
    """What a user says about an evaluation.

    `features` is `digits-cnn`, `random`, `inception:PATH`, or `auto`: the digits classifier for `digits`, else `random`.
    `reference_images` limits the reference. `ranges` is `uniform:N`, a partition.json or `none`.
    """

    data: str
    split: str = "test"
    skip_broken: bool = False
    features: str = "auto"
    preprocess: Preprocess = "clean"
    precision: str = "no"
    num_images: int = 2000
    reference_images: int | None = None
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 50
    sampler: str = "ddim"
    ranges: str = "uniform:4"
    loss_samples: int = 512
    lpips: bool = True
    batch_size: int = 64
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A contest, who enters it, and real images for the noise floor, where the data has another split."""

    contest: Contest
    entrants: list[Entrant]
    others: ImageData | None

    def run(self) -> Iterator[Scores]:
        """Score the noise floor, then every entrant."""
        if self.others is not None:
            yield self.contest.noise_floor(self.others)
        yield from self.contest.run(self.entrants)


def prepare(
    models: Sequence[str], words: Words, out: Path, *, base: str | None = None, progress: Progress | None = None
) -> Prepared:
    """Load what an evaluation needs: the base's shape, the data, the reference's features, the nets.

    Raises:
        UsageError, InputError: where a word is wrong or a model, the data or the weights cannot be read.
    """
    found = entrants(models, base)
    base = base or next((e.source for e in found if e.kind == "base"), None)
    model = _some_model(found, base)
    partition = None if model is None or words.ranges == "none" else Partition.parse(words.ranges, model.T, besides="none")
    load = partial(load_images, words.data, skip_broken=words.skip_broken)
    if model is not None:
        load = partial(load, channels=model.image_shape[0], resolution=model.image_shape[1])
    data = load(split=words.split)
    contest = Contest(
        _judge(words, load(split=words.split, limit=words.reference_images), out, progress),
        data,
        out,
        words.num_images,
        tuple(words.seeds),
        base=base,
        partition=partition,
        loss_samples=words.loss_samples,
        batch_size=words.batch_size,
        device=words.device,
        progress=progress,
    )
    others = load(split=OTHER[words.split], limit=words.num_images) if words.split in OTHER else None
    return Prepared(contest, found, others)


def _some_model(found: Sequence[Entrant], base: str | None) -> Diffusion | None:
    """Load the base, or else some pipeline, for its shape and T; None where there are image folders alone."""
    pipelines = [e for e in found if not e.is_images]
    if base is None and any(e.kind == "ensemble" for e in pipelines):
        raise UsageError("a routed ensemble needs the base's schedule", fix="give --base MODEL")
    return Diffusion.load(base or pipelines[0].source) if pipelines else None


def _judge(words: Words, real: ImageData, out: Path, progress: Progress | None) -> Judge:
    spec = words.features if words.features != "auto" else "digits-cnn" if real.name == "digits" else "random"
    net = feature_net(spec, preprocess=words.preprocess, precision=words.precision, device=words.device)
    images, kept = real.images(range(len(real))), out / f"reference-{net.name}.safetensors"
    reference = Reference.remembered(kept, net, images, name=f"{real.name} {real.split}", progress=progress)
    perceptual = load_lpips(device=words.device) if words.lpips else None
    return Judge(net, reference, sampler=words.sampler, steps=words.steps, perceptual=perceptual)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `0,1,2`.

    Raises:
        UsageError: where this is no list of different seeds >= 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise UsageError(f"seeds '{text}' are no list of different numbers", fix="for example 0,1,2")
    return tuple(map(int, parts))
