"""Buckets of aspect ratios: which image has which size, batches of one size, the same bits again."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from demerge.data import ImageData, load_images
from demerge.data.values import as_floats
from demerge.diffusion.encoded import EncodedData
from demerge.diffusion.model import Diffusion
from demerge.errors import InputError, Preempted, UsageError
from demerge.finetuning import FinetuneOptions, finetune
from demerge.finetuning.batches import Batches
from demerge.finetuning.buckets import batches_of_epoch, check_buckets, make_buckets
from demerge.finetuning.options import FinetuneInputs
from demerge.finetuning.planning import plan
from demerge.finetuning.trainer import ExpertTraining, Job
from demerge.parallel import World
from demerge.timesteps import TimestepRange

SPAN = TimestepRange(0, 500)
OPTIONS = FinetuneOptions(
    max_train_steps=6,
    train_batch_size=2,
    learning_rate=1e-3,
    aspect_ratio_buckets="16,32; 16,16; 32,16",
)
SIZES = [(20, 40), (40, 20), (30, 30), (20, 44), (20, 20), (50, 20), (24, 40)]  # (height, width)
BUCKET = [0, 2, 1, 0, 1, 2, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images of three aspects, with captions."""
    path, random = tmp_path_factory.mktemp("aspects"), np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"picture {i}")
    return path


@pytest.fixture(scope="module")
def base(tiny_text: Path) -> Diffusion:
    return Diffusion.load(tiny_text)


@pytest.fixture(scope="module")
def data(folder: Path) -> ImageData:
    return load_images(folder, split="all", resolution=16)


def test_an_image_is_in_the_bucket_of_its_aspect(
    base: Diffusion, data: ImageData, folder: Path
) -> None:
    buckets = make_buckets(base, data, OPTIONS)
    assert [len(bucket.data) for bucket in buckets] == [3, 2, 2]
    assert [bucket.base.sample_shape for bucket in buckets] == [(4, 8, 16), (4, 8, 8), (4, 16, 8)]
    for number, bucket in enumerate(buckets):
        own = [i for i, b in enumerate(BUCKET) if b == number]
        assert bucket.data.captions == [f"picture {i}" for i in own]
        (_, height, width), first = bucket.data.shape, Image.open(folder / f"{own[0]}.png")
        cropped = ImageOps.fit(first, (width, height), Image.Resampling.LANCZOS)
        assert np.array_equal(
            bucket.data.images([0])[0].permute(1, 2, 0).numpy(), np.asarray(cropped)
        )
    assert data.images([0]).shape == (1, 3, 16, 16)
    check_buckets(buckets)


def test_an_epoch_has_every_image_in_batches_of_one_bucket() -> None:
    counts = (5, 2, 4)
    for epoch in range(3):
        batches = batches_of_epoch(counts, 2, 0, epoch)
        assert all(len(images) == 2 for _, images in batches)
        seen = Counter((bucket, i) for bucket, images in batches for i in images)
        assert set(seen) == {(b, i) for b, count in enumerate(counts) for i in range(count)}
        assert sum(seen.values()) == 12 and max(seen.values()) == 2  # one batch is filled up
    assert batches_of_epoch(counts, 2, 0, 0) != batches_of_epoch(counts, 2, 0, 1)
    assert batches_of_epoch(counts, 2, 0, 0) != batches_of_epoch(counts, 2, 1, 0)
    assert batches_of_epoch((1,), 3, 0, 0) == [(0, [0, 0, 0])]


@pytest.mark.parametrize("antithetic", [False, True])
def test_batches_have_the_values_of_their_bucket(
    base: Diffusion, data: ImageData, tmp_path: Path, antithetic: bool
) -> None:
    options = replace(OPTIONS, antithetic=antithetic, caption_dropout=0.0)
    buckets = make_buckets(base, data, options)
    components = base.identity["components"]
    stored = [EncodedData(b.base, b.data, tmp_path, components, batch=2) for b in buckets]
    for encoded in stored:
        encoded.fill()
        encoded.open()
    plain = Batches(base, data, SPAN, options)
    kept = Batches(base, data, SPAN, options, encoders=stored)
    counts, shapes = tuple(len(b.data) for b in buckets), set()
    for step in range(5):
        (a,), (b,) = plain.step(step), kept.step(step)
        for mine, theirs in zip(a.tensors(), b.tensors(), strict=True):
            assert torch.equal(mine, theirs)
        per_epoch = 4 if not antithetic else 7
        size = 1 if antithetic else 2
        number, images = batches_of_epoch(counts, size, 0, step // per_epoch)[step % per_epoch]
        bucket = buckets[number]
        rows = [i for i in images for _ in range(2 if antithetic else 1)]
        x0, condition = bucket.base.encode(
            as_floats(bucket.data.images(rows)), *bucket.data.annotations(rows)
        )
        assert torch.equal(a.x0, x0) and a.noise.shape == x0.shape
        assert torch.equal(a.condition["encoder_hidden_states"], condition["encoder_hidden_states"])
        shapes.add(tuple(a.x0.shape))
    assert len(shapes) > 1
    plain.close()
    kept.close()


def test_processes_take_batches_in_turns(base: Diffusion, data: ImageData) -> None:
    two = replace(OPTIONS, gradient_accumulation_steps=2)
    alone = [batch.x0 for step in range(2) for batch in Batches(base, data, SPAN, two).step(step)]
    shared = [
        Batches(base, data, SPAN, OPTIONS, World(rank, 2)).step(step)[0].x0
        for step in range(2)
        for rank in range(2)
    ]
    for mine, theirs in zip(alone, shared, strict=True):
        assert torch.equal(mine, theirs)


def test_a_resumed_run_ends_in_the_same_bits(
    base: Diffusion, data: ImageData, tmp_path: Path
) -> None:
    steps = itertools.count(1)
    with pytest.raises(Preempted):
        list(finetune(base, data, [SPAN], OPTIONS, tmp_path / "cut", stop=lambda: next(steps) == 3))
    for name in ("cut", "whole"):
        list(finetune(base, data, [SPAN], OPTIONS, tmp_path / name))
    cut, whole = (Diffusion.load(tmp_path / n / str(SPAN)).sha256 for n in ("cut", "whole"))
    assert cut == whole != base.sha256


def test_the_plan_names_the_buckets(tiny_text: Path, folder: Path, tmp_path: Path) -> None:
    inputs = FinetuneInputs(
        model=str(tiny_text),
        data=str(folder),
        split="all",
        out=tmp_path,
        ranges="joint",
        device="cpu",
    )
    lines = plan(inputs, OPTIONS).describe()
    assert "buckets 16x32 (3), 16x16 (2), 32x16 (2)" in lines


def test_what_cannot_be_is_refused(
    base: Diffusion, data: ImageData, tiny_dit: Path, tmp_path: Path
) -> None:
    for text in ("16x16", "16,16;", "0,16", "", "16,-8"):
        with pytest.raises(UsageError, match="is not a height and a width"):
            replace(OPTIONS, aspect_ratio_buckets=text)
    with pytest.raises(UsageError, match="multiples of 2 pixels"):
        make_buckets(base, data, replace(OPTIONS, aspect_ratio_buckets="16,15"))
    digits = load_images("digits", resolution=16, channels=3, limit=5)
    with pytest.raises(UsageError, match="the sizes of the images of digits are not known"):
        make_buckets(base, digits, OPTIONS)
    with pytest.raises(InputError, match="cannot be run"):  # its positions are of one size
        check_buckets(make_buckets(Diffusion.load(tiny_dit), data, OPTIONS))
    run = ExpertTraining(Job(base, data, OPTIONS, {}), SPAN, tmp_path)
    assert not run._may_capture
