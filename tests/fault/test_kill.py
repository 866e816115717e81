"""SIGKILL at any moment of training: the newest checkpoint loads, the end is the same to the bit."""

from __future__ import annotations

import os
import signal
import time
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
    max_train_steps=24, train_batch_size=2, checkpointing_steps=1, logging_steps=3
)


def train(base: Diffusion, data: ImageData, out: Path) -> str:
    for _ in finetune(base, data, [SPAN], OPTIONS, out):
        pass
    return Diffusion.load(out / str(SPAN)).sha256


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_training_ends_bit_identical(tiny: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base, data = Diffusion.load(tiny), load_images("digits", split="train", limit=16)
    whole = train(base, data, tmp_path / "whole")
    random, killed = np.random.default_rng(0), 0
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                train(base, data, tmp_path / "killed")
            finally:
                os._exit(0)
        time.sleep(float(random.uniform(0.05, 0.6)))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    assert killed >= 2
    assert train(base, data, tmp_path / "killed") == whole
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [str(SPAN)]
