"""SIGKILL at any moment of training: the newest checkpoint loads, the end is the same to the bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from demerge.data import ImageData, load_images
from demerge.diffusion.model import Diffusion
from demerge.finetuning import FinetuneOptions, finetune
from demerge.timesteps import TimestepRange

SPAN = TimestepRange(0, 1000)
OPTIONS = FinetuneOptions(
    max_train_steps=12,
    train_batch_size=2,
    gradient_accumulation_steps=2,
    mixed_precision="fp16",
    checkpointing_steps=1,
    logging_steps=3,
)


def train(base: Diffusion, data: ImageData, out: Path) -> str:
    for _ in finetune(base, data, [SPAN], OPTIONS, out):
        pass
    return Diffusion.load(out / str(SPAN)).sha256


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_training_ends_bit_identical(
    make_tiny: Callable[..., Path], tmp_path: Path, kills: int
) -> None:
    """With accumulation, a scaled loss, dropout, the projection and the average."""
    torch.set_num_threads(1)
    base = Diffusion.load(make_tiny(dropout=0.1))
    data = load_images("digits", split="train", limit=16)
    start = time.perf_counter()
    whole = train(base, data, tmp_path / "whole")
    longest = time.perf_counter() - start
    random, killed = np.random.default_rng(0), 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                train(base, data, tmp_path / "killed")
            finally:
                os._exit(0)
        time.sleep(float(random.uniform(0.1, 3)) * longest / kills)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    assert killed >= kills / 2
    assert train(base, data, tmp_path / "killed") == whole
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [str(SPAN)]
