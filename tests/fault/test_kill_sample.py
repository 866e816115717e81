"""SIGKILL at any moment of `sample`: every image that is there is whole, and the same call again ends in the same bytes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from demerge.diffusion.drawing import plan_images
from demerge.diffusion.model import Diffusion
from demerge.diffusion.options import SampleOptions


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_sample_keeps_whole_images_and_continues(tiny: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = Diffusion.load(tiny)
    options = SampleOptions(num_images=24, seed=0, steps=4, batch_size=4)
    begin = time.monotonic()
    plan_images(tmp_path / "whole", model, options).run()
    took = time.monotonic() - begin
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    random, out, killed = np.random.default_rng(0), tmp_path / "out", 0
    for _ in range(5):
        child = os.fork()
        if child == 0:
            try:
                plan_images(out, model, options).run()
            finally:
                os._exit(0)
        time.sleep(float(random.uniform(0.05, 0.4)) * took)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        for path in out.glob("[0-9s]*") if out.exists() else ():
            assert path.read_bytes() == whole[path.name]
    assert killed >= 2
    plan_images(out, model, options).run()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
