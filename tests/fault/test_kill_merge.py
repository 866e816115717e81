"""SIGKILL at any moment of a merge: the output is whole or absent, and the next merge sweeps what was left."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from demerge.files import sha256
from demerge.merge import merge


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_merge_leaves_all_or_nothing(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for name in ("base", "expert"):
        save_file({str(i): torch.randn(300_000) for i in range(8)}, tmp_path / f"{name}.safetensors")
    base, expert = tmp_path / "base.safetensors", tmp_path / "expert.safetensors"
    whole = sha256(merge(base, [expert], tmp_path / "whole.safetensors", method="ties").path)
    random, out, killed = np.random.default_rng(0), tmp_path / "out.safetensors", 0
    for _ in range(5):
        child = os.fork()
        if child == 0:
            try:
                merge(base, [expert], out, method="ties")
            finally:
                os._exit(0)
        time.sleep(float(random.uniform(0.01, 0.25)))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if out.exists():
            assert sha256(out) == whole
            out.unlink()
    assert killed >= 3
    merge(base, [expert], out, method="ties")
    assert sha256(out) == whole
    assert not list(tmp_path.glob(".*"))
